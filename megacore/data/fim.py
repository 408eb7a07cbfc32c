"""Fill-in-the-middle: some documents are rearranged so that a model learns to write the middle from both sides.

A document is cut at two random places into prefix, middle and suffix, and becomes (Bavarian et al., "Efficient
Training of Language Models to Fill in the Middle", 2022; SPM in the variant of their appendix D)

    PSM:  <prefix> prefix <suffix> suffix <middle> middle
    SPM:  <prefix> <suffix> suffix <middle> prefix middle

They cut characters before tokenising; we cut tokens, inside a finished sample and per document, so that a sample keeps
its length and no document moves: the last three tokens of a rearranged document give room to the three markers. Its
EOD stays at the end. Every choice is a hash of (seed, split, sample ordinal, document): the same on any rank.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megacore.data.counter import draws, hash_key, uniform

NUM_MARKERS = 3
SHORTEST = 2 * NUM_MARKERS  # tokens; a shorter document is left as it is
DRAWS = 4  # random numbers per document

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class FimTokens:
    """Ids of the three markers."""

    prefix: int
    middle: int
    suffix: int


@dataclass(frozen=True)
class FillInMiddle:
    """What is rearranged, how often, and from which seed.

    Args:
        rate: share of documents rearranged.
        spm_rate: share of those in suffix-prefix-middle order.
        eod: end-of-document token, which stays last; None: there is none.
    """

    tokens: FimTokens
    rate: float
    spm_rate: float
    eod: int | None
    seed: int
    split: str

    def apply(self, text: Ints, starts: NDArray[np.bool_], ordinal: int) -> None:
        """Rearrange a sample in place.

        Args:
            text: [n] tokens.
            starts: [n] True where a document starts (position 0 counts as one anyway).
            ordinal: of the sample.
        """
        begins = np.concatenate([[0], np.flatnonzero(starts)])
        ends = np.append(begins[1:], len(text))
        if self.eod is not None:
            ends = ends - (text[ends - 1] == self.eod)
        words = draws(hash_key(self.seed, "fim", self.split, ordinal), DRAWS * len(begins)).reshape(-1, DRAWS)
        chances = uniform(words)
        for number in np.flatnonzero((chances[:, 0] < self.rate) & (ends - begins >= SHORTEST)):
            content = text[begins[number] : ends[number]]
            room = len(content) - NUM_MARKERS
            first, second = sorted(int(chance * (room + 1)) for chance in chances[number, 2:])
            spm = bool(chances[number, 1] < self.spm_rate)
            content[:] = self._rearranged(content[:room].copy(), first, second, spm)

    def _rearranged(self, content: Ints, first: int, second: int, spm: bool) -> Ints:
        prefix, middle, suffix = content[:first], content[first:second], content[second:]
        marks = self.tokens
        if spm:
            return np.concatenate([[marks.prefix, marks.suffix], suffix, [marks.middle], prefix, middle])
        return np.concatenate([[marks.prefix], prefix, [marks.suffix], suffix, [marks.middle], middle])
