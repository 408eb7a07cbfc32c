"""Which layers each pipeline stage holds."""

from collections.abc import Sequence

from megacore.layout.partition import balanced


def stages_of_layers(num_layers: int, num_stages: int, stage_layers: Sequence[int] = ()) -> tuple[range, ...]:
    """The layers of every stage, in order; ``stage_layers`` gives counts, else they are dealt out evenly.

    Raises ValueError if the counts do not fit.
    """
    if not stage_layers:
        shares = (balanced(num_layers, num_stages, stage) for stage in range(num_stages))
        return tuple(range(start, start + size) for start, size in shares)
    if len(stage_layers) != num_stages or sum(stage_layers) != num_layers:
        raise ValueError(
            f"parallel.stage_layers={list(stage_layers)} has {len(stage_layers)} stages and "
            f"{sum(stage_layers)} layers; give {num_stages} counts that sum to {num_layers}"
        )
    ranges, start = [], 0
    for count in stage_layers:
        ranges.append(range(start, start + count))
        start += count
    return tuple(ranges)
