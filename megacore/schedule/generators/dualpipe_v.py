"""DualPipe-V: forwards and backwards of different microbatches overlap, on a folded pipeline (DeepSeek-AI 2024,
DeepSeek-V3, arXiv 2412.19437, section 3.2.1; folded as the README of DeepSeek's DualPipe says)."""

from collections.abc import Iterator

from megacore.schedule.generators.placement import fold
from megacore.schedule.generators.spell import spell, words
from megacore.schedule.schedule import Instructions


def dualpipe_v(num_ranks: int, num_microbatches: int, chunks: int) -> tuple[Instructions, ...]:
    """Rank r has chunk 0 on the way down the ranks and chunk 1 on the way back up; most of the time it runs pairs.

    Rank 0, the idlest, works from the first moment to the last but for (p-1)(FB + B - 3W) of a chunk's work, FB being
    the time of a pair (for less where F < I or pairs overlap); at most p + 1/2 microbatches of a rank's layers are
    alive. Lists for fewer than 2p microbatches are those for 2p without the rest.

    One rank (stages 0 and 1), two microbatches::

        0: F0.0 F1.0 F0.1 B1.0 FB1.1:0.0 B1.1 I0.1 W0.1
    """
    assert chunks == 2, chunks
    long_enough = max(num_microbatches, 2 * num_ranks)
    return tuple(
        spell(words(_phases(rank, num_ranks, long_enough)), fold(rank, num_ranks), num_microbatches)
        for rank in range(num_ranks)
    )


def _phases(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[tuple[str, int]]:
    above, below = rank + 1, num_ranks - 1 - rank
    # Warm-up.
    yield "F0", 2 * below
    yield "F0 F1", above
    yield "I1 W1 F1", below
    # Steady: two pairs in turn. The last rank takes its first pair apart, for all others wait for the gradient in it.
    yield ("F0B1" if below else "F0 B1") + " F1B0", 1
    yield "F0B1 F1B0", num_microbatches - 2 * num_ranks + above - 1
    yield "B1 F1B0", below
    # Cool-down: both chunks in turn, then chunk 0; of these 2 above + below backwards only the first are whole.
    # The weight gradients of the others wait in a queue until nothing else is left or nothing else can be done.
    chunks = ["1", "0"] * above + ["0"] * below
    split = chunks[above:]
    yield " ".join("B" + chunk for chunk in chunks[:above]), 1
    yield " ".join("I" + chunk for chunk in split[:above]), 1
    yield " ".join(f"W{done} I{chunk}" for done, chunk in zip(split, split[above:], strict=False)), 1
    yield " ".join("W" + chunk for chunk in split[below:]), 1
