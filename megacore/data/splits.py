"""Train, validation and test: consecutive ranges of a data set's sequences, by Megatron's rule.

Shares are normalised; bounds are running sums from 0; a range ends at `round(bound * sequences)`, where a half goes
to the even neighbour (Python's `round`), so that the ranges equal Megatron-LM's to the last sequence.
"""

import math
from collections.abc import Sequence

import numpy as np

SPLITS = ("train", "valid", "test")


def split_bounds(shares: Sequence[float], num_sequences: int) -> list[tuple[int, int]]:
    """Sequence ranges [first, last) of train, validation and test.

    Args:
        shares: one to three numbers; missing ones are 0.

    Raises:
        ValueError: shares are negative, more than three, or sum to 0.
    """
    values = np.zeros(len(SPLITS), np.float64)
    if not 1 <= len(shares) <= len(SPLITS) or min(shares) < 0 or sum(shares) <= 0:
        rule = "needs one to three shares, none negative, that sum to more than 0"
        raise ValueError(f"data.split={list(shares)} {rule}; try [969, 30, 1]")
    values[: len(shares)] = shares
    bounds = [0.0]
    for share in (values / np.sum(values)).tolist():
        bounds.append(bounds[-1] + share)
    ends = [round(bound * num_sequences) for bound in bounds]
    return list(zip(ends[:-1], ends[1:], strict=True))


def split_range(shares: Sequence[float], num_sequences: int, split: str, prefix: str) -> tuple[int, int]:
    """The sequence range of one split of one data set, never empty.

    Raises:
        ValueError: the split gets no sequence; the message says which share or which corpus size would do.
    """
    number = SPLITS.index(split)
    ranges = split_bounds(shares, num_sequences)
    first, last = ranges[number]
    if last > first:
        return first, last
    what = f"data.split={list(shares)} gives {split} none of the {num_sequences} documents of {prefix}"
    if number >= len(shares) or shares[number] == 0:
        raise ValueError(f"{what}; give {split} a share above 0")
    enough = math.ceil(sum(shares) / shares[number]) + 1  # a range longer than one sequence cannot be rounded away
    fixes = [
        f"use a corpus of {enough} documents or more",
        "prepare plain text with --documents paragraph (else a file is one document)",
        f"raise the {split} share",
    ]
    if split != "train":
        fixes += ["give data of its own in data.eval_blend", "do not evaluate"]
    raise ValueError(f"{what}; {', '.join(fixes[:-1])}, or {fixes[-1]}")
