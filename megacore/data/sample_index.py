"""Our order of samples: what a sample holds is a function of (seed, its number) alone.

Every epoch all sequences are laid end to end in an order of its own, and the epochs one after the other:
one endless stream of tokens. Sample k of the stream starts at token k * seq_len, so every token is a target once per
epoch and the tail of an epoch is completed from the next one. The samples that start in one epoch are shuffled among
themselves. Both shuffles are keyed permutations (csrc/data/permutation.h): nothing is stored for them, and a run that
is resumed, extended or laid out on other ranks meets the same samples. Of an epoch only the number of tokens before
every 256th sequence is kept; from there a look-up walks.
"""

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from megacore.data import native
from megacore.data.cache import Arrays, IndexCache
from megacore.data.counter import permutation_keys

STRIDE = 256  # sequences between two entries of an epoch's table: 3% of the index's memory, microseconds to walk
CACHED_FROM = 1 << 16  # sequences: a smaller table is built sooner than a file is opened
KEPT_TABLES = 64


class SampleIndex:
    """Samples of one split of one data set, in our order.

    Args:
        lengths: [n] tokens of the split's sequences.
        first: number of the first of them in the data set.
        seq_len: tokens of a sample; one more is read, the last target.
        seed: of the run.
        split: its name; splits are shuffled independently.
        fingerprint: of the data set's content, for the cache.

    Raises:
        ValueError: the split holds no tokens.
    """

    def __init__(
        self,
        lengths: NDArray[np.int32],
        first: int,
        seq_len: int,
        seed: int,
        split: str,
        fingerprint: str,
        cache: IndexCache,
    ) -> None:
        self.lengths, self.first, self.seq_len, self.seed, self.split = lengths, first, seq_len, seed, split
        self.fingerprint, self.cache = fingerprint, cache
        self.tokens = int(lengths.sum(dtype=np.int64))
        if not self.tokens:
            raise ValueError("the data holds no tokens; prepare a corpus with text in it")
        self._tables: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def epoch_samples(self, epoch: int) -> tuple[int, int]:
        """Range [first, last) of the samples that start in an epoch; empty where the epoch is shorter than one."""
        return -(-epoch * self.tokens // self.seq_len), -(-(epoch + 1) * self.tokens // self.seq_len)

    def num_epochs(self, num_samples: int) -> int:
        """Epochs of which a run of so many samples reads tokens."""
        return max(1, -(-(num_samples * self.seq_len + 1) // self.tokens))

    def source(self, sample: int) -> tuple[int, int]:
        """(number of the sample in the stream, epoch in which it starts)."""
        epoch = sample * self.seq_len // self.tokens
        first, last = self.epoch_samples(epoch)
        keys = permutation_keys(last - first, self.seed, self.split, "samples", epoch)
        return first + int(native.loops.permute(last - first, keys, sample - first, 1)[0]), epoch

    def locate(self, sample: int) -> NDArray[np.int64]:
        """[pieces, 3] (sequence of the data set, offset, length): the sample's seq_len + 1 tokens, in order."""
        epoch, start = divmod(self.source(sample)[0] * self.seq_len, self.tokens)
        missing, parts = self.seq_len + 1, []
        while missing:
            count = min(missing, self.tokens - start)
            table, keys = self.table(epoch), self._sequence_keys(epoch)
            parts.append(native.loops.locate(table, self.lengths, keys, STRIDE, start, count))
            missing, epoch, start = missing - count, epoch + 1, 0
        pieces = np.concatenate(parts) if len(parts) > 1 else parts[0]
        pieces[:, 0] += self.first
        return pieces

    def table(self, epoch: int) -> NDArray[np.int64]:
        """Tokens before every 256th sequence of an epoch; built or read from the cache when first needed."""
        if epoch in self._tables:
            self._tables.move_to_end(epoch)
            return self._tables[epoch]
        if len(self.lengths) < CACHED_FROM:
            arrays = self._build(epoch)
        else:
            arrays = self.cache.get(self._key(epoch), lambda: self._build(epoch))
        self._tables[epoch] = arrays["table"]
        if len(self._tables) > KEPT_TABLES:
            self._tables.popitem(last=False)
        return self._tables[epoch]

    def build(self, num_samples: int) -> None:
        """Build the tables that a run of so many samples reads, as far as they are worth a place in the cache."""
        num_epochs = self.num_epochs(num_samples) if len(self.lengths) >= CACHED_FROM else 1
        for epoch in range(min(num_epochs, KEPT_TABLES)):
            self.table(epoch)

    def _sequence_keys(self, epoch: int) -> NDArray[np.uint64]:
        return permutation_keys(len(self.lengths), self.seed, self.split, "sequences", epoch)

    def _build(self, epoch: int) -> Arrays:
        return {"table": native.loops.epoch_table(self.lengths, self._sequence_keys(epoch), STRIDE)}

    def _key(self, epoch: int) -> dict[str, str | int]:
        return {
            "kind": "epoch table",
            "data": self.fingerprint,
            "first": self.first,
            "sequences": len(self.lengths),
            "seed": self.seed,
            "split": self.split,
            "epoch": epoch,
            "stride": STRIDE,
        }
