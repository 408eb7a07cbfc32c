"""ZB-V: zero bubble in 1F1B's memory, by folding the pipeline (Qi et al. 2024, Zero Bubble Pipeline Parallelism, arXiv
2401.10241, section 6)."""

from collections.abc import Iterator

from megacore.schedule.generators.placement import fold
from megacore.schedule.generators.spell import spell, words
from megacore.schedule.schedule import Instructions


def zb_v(num_ranks: int, num_microbatches: int, chunks: int) -> tuple[Instructions, ...]:
    """Rank r has chunk 0 on the way down the ranks and chunk 1 on the way back up.

    With F = I = W no rank idles between its first and its last instruction, and at most p microbatches of a rank's
    layers are alive. Lists for fewer than 2p - 1 microbatches are those for 2p - 1 without the rest.

    One rank (stages 0 and 1), two microbatches::

        0: F0.0 F1.0 I1.0 W1.0 F0.1 I0.0 W0.0 F1.1 I1.1 W1.1 I0.1 W0.1
    """
    assert chunks == 2, chunks
    long_enough = max(num_microbatches, 2 * num_ranks - 1)
    return tuple(
        spell(words(_phases(rank, num_ranks, long_enough)), fold(rank, num_ranks), num_microbatches)
        for rank in range(num_ranks)
    )


def _phases(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[tuple[str, int]]:
    below = num_ranks - rank
    # Warm-up: down, until the first microbatch is back up; its gradient then comes down in turn with the rest.
    yield "F0", 2 * below - 1
    yield "F1 F0", rank
    yield "F1 I1 W1", below
    # The forwards of chunk 0 end first: what counts past the last microbatch is left out.
    yield "F0 I0 W0 F1 I1 W1", num_microbatches - num_ranks
    # Cool-down: input gradients first, since other ranks wait for them.
    yield "I0 I1", rank
    yield "I0 W0", below
    yield "W1", rank
    yield "W0", rank
