"""Which stages a rank holds."""


def loop(rank: int, num_ranks: int, chunks: int) -> tuple[int, ...]:
    """Stage s lives on rank s mod p: the pipeline runs through the ranks ``chunks`` times."""
    return tuple(rank + chunk * num_ranks for chunk in range(chunks))


def fold(rank: int, num_ranks: int) -> tuple[int, int]:
    """The pipeline runs down the ranks and back up, as a V: the first and the last stage share rank 0."""
    return rank, 2 * num_ranks - 1 - rank
