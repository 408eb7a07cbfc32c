"""Which layers each pipeline stage holds."""

from collections.abc import Sequence
from heapq import heapify, heapreplace

from megacore.config.pipeline import cut_problem


def stages_of_layers(
    num_layers: int, num_stages: int, stage_layers: Sequence[int] = (), embedding: float = 0.0, head: float = 0.0
) -> tuple[range, ...]:
    """The layers of every stage, in order; ``stage_layers`` gives counts, else they are balanced by cost.

    Stage 0 also holds the embedding and the last stage the head; a layer costs 1, these two what they are said to. The
    balanced split has the smallest largest stage, of those the most even one (least sum of squares), of those the one
    whose first stages hold more.

    Raises ValueError if the layers cannot be cut so.
    """
    if problem := cut_problem(num_layers, num_stages, stage_layers):
        raise ValueError(problem)
    ranges, start = [], 0
    for count in stage_layers or _balanced_counts(num_layers, num_stages, embedding, head):
        ranges.append(range(start, start + count))
        start += count
    return tuple(ranges)


def _balanced_counts(num_layers: int, num_stages: int, embedding: float, head: float) -> list[int]:
    """Layers of each stage. Each layer in turn goes to the cheapest stage so far: with equal items that is the best."""
    if num_stages == 1:
        return [num_layers]
    counts = [0, *[1] * (num_stages - 2), 0]
    costs = [embedding, *[1.0] * (num_stages - 2), head]
    cheapest = list(zip(costs, range(num_stages)))
    heapify(cheapest)
    for _ in range(num_layers - sum(counts)):
        cost, stage = cheapest[0]
        counts[stage] += 1
        heapreplace(cheapest, (cost + 1, stage))
    return counts
