"""Documents inside a sample: where one ends, and what that means for positions, attention and targets.

A sample is cut from documents laid end to end. A new document starts after an end-of-document token (EOD), and where
two sequences of the data set meet (which is the same place, where the data was prepared with EODs).
"""

import numpy as np
from numpy.typing import NDArray

IGNORE = -100  # the label of a position that has no target; torch's ignore_index

Ints = NDArray[np.int64]


def document_starts(text: Ints, piece_lengths: Ints, eod: int | None) -> NDArray[np.bool_]:
    """[n] True where another document starts than the one before; never at 0.

    Args:
        text: [n] tokens of a sample.
        piece_lengths: lengths of the sequences' parts that it is made of; their sum is n.
        eod: id of the end-of-document token; None: there is none.
    """
    starts = np.zeros(len(text) + 1, np.bool_)
    starts[np.cumsum(piece_lengths)] = True
    if eod is not None:
        starts[1:] |= text == eod
    starts[0] = False
    return starts[:-1]


def document_numbers(starts: NDArray[np.bool_]) -> Ints:
    """[n] number of each token's document within the sample, from 0; a token attends to its own number only."""
    return np.cumsum(starts, dtype=np.int64)


def document_positions(starts: NDArray[np.bool_]) -> Ints:
    """[n] positions that begin at 0 in every document of the sample."""
    places = np.arange(len(starts), dtype=np.int64)
    return places - np.maximum.accumulate(np.where(starts, places, 0))


def labels_of(text: Ints, masked_eod: int | None) -> Ints:
    """[n - 1] the next token of each but the last; `IGNORE` where that is the end-of-document token to be masked."""
    labels = text[1:].copy()
    if masked_eod is not None:
        labels[labels == masked_eod] = IGNORE
    return labels
