"""DualPipe-V: forwards and backwards of different microbatches overlap, on a folded pipeline (DeepSeek-AI 2024,
DeepSeek-V3, arXiv 2412.19437, section 3.2.1; "cut in half" in the README of DeepSeek's DualPipe)."""

from collections.abc import Iterator

from megacore.schedule.generators.placement import fold
from megacore.schedule.generators.spell import spell, words
from megacore.schedule.schedule import Instructions


def dualpipe_v(num_ranks: int, num_microbatches: int, chunks: int) -> tuple[Instructions, ...]:
    """Rank r has chunk 0 on the way down the ranks and chunk 1 on the way back up; most of the time it runs pairs.

    Made for m >= 2p; shorter ones are its beginning.

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
    below = num_ranks - 1 - rank
    # Warm-up.
    yield "F0", 2 * below
    yield "F0 F1", rank + 1
    yield "I1 W1 F1", below
    # Steady: two pairs in turn. The last rank takes its first pair apart, for all others wait for the gradient in it.
    steady = num_microbatches - 2 * num_ranks + rank + 1
    first = "F0 B1" if below == 0 else "F0B1"
    yield f"{first} F1B0", 1
    yield "F0B1 F1B0", steady - 1
    yield "B1 F1B0", below
    # Cool-down: the last p backwards are split; their weight gradients wait in a queue and fill the gaps.
    last = ["1", "0"] * (rank + 1) + ["0"] * below
    whole, split = last[: rank + 1], last[rank + 1 :]
    queue = split.copy()
    yield " ".join(f"B{chunk}" for chunk in whole), 1
    yield " ".join(f"I{chunk}" for chunk in split[: rank + 1]), 1
    for chunk in split[rank + 1 :]:
        yield f"W{queue.pop(0)} I{chunk}", 1
    yield " ".join(f"W{chunk}" for chunk in queue), 1
