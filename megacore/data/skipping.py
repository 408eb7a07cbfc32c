"""Samples that a run leaves out: where the n-th sample that it takes lies among all of them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Holes = Sequence[tuple[int, int]]
"""Runs of ordinals [first, last), ascending and apart, that are never met."""


def place(counted: NDArray[np.int64], holes: Holes) -> NDArray[np.int64]:
    """[n] The ordinals of the samples that are the counted-th (from 0) of those that are not left out."""
    ordinals = counted.copy()
    for first, last in sorted(holes):
        ordinals[ordinals >= first] += last - first
    return ordinals


def place_of(counted: int, holes: Holes) -> int:
    """As ``place``, of one."""
    return int(place(np.array([counted]), holes)[0])
