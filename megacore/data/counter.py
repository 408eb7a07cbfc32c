"""Random numbers without state: each is a hash of what it is for, so any of them can be asked for at any time.

Philosophy: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011); the hash is splitmix64's finaliser.
"""

import numpy as np
from numpy.typing import NDArray

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: consecutive counters land far apart
# Rounds of a keyed permutation, even. Four make a Feistel network indistinguishable from chance where its halves are
# large (Luby and Rackoff, 1988); few elements mix slowly and get more.
NUM_ROUNDS, NUM_ROUNDS_SMALL, SMALL = 4, 24, 1024


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser, element by element; arithmetic is modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_key(*words: int | str) -> int:
    """One 64-bit key for a tuple of integers and names; the order of the words matters."""
    key = np.zeros(1, np.uint64)
    for word in words:
        number = int.from_bytes(word.encode(), "little") if isinstance(word, str) else word
        while True:  # a word longer than 64 bits enters piece by piece
            key = mix64(key * np.uint64(GOLDEN) + np.uint64(number & MASK) + np.uint64(GOLDEN))
            number >>= 64
            if number in (0, -1):
                break
    return int(key[0])


def draws(key: int, count: int) -> NDArray[np.uint64]:
    """[count] random 64-bit words, the same for the same key whatever the count."""
    counters = np.arange(1, count + 1, dtype=np.uint64)
    return mix64(np.uint64(key) + counters * np.uint64(GOLDEN))


def uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Random words as floats in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation_keys(size: int, *words: int | str) -> NDArray[np.uint64]:
    """The round keys of a keyed permutation of [0, size), for `native.loops.permute`."""
    return draws(hash_key(*words), NUM_ROUNDS_SMALL if size < SMALL else NUM_ROUNDS)
