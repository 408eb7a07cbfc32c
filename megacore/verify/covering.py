"""A small choice among all legal layouts: every pair of values, of any two axes, that is legal together is in one.

All combinations would be thousands. Faults of layouts nearly always need at most two axes to meet (pairwise testing,
Kuhn, Wallace and Gallo 2004), and a greedy choice covers all pairs with a few dozen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import combinations, product

from megacore.config.pipeline import num_chunks
from megacore.config.schema import ParallelConfig, RunConfig
from megacore.verify.layouts import ONE, num_ranks, why_illegal

Values = tuple[object, ...]
CHUNKS = (1, 2, 3)
STAGES = (1, 2, 3)
"""Of ZeRO."""
SEQUENCE = ((False, False), (True, False), (True, True))  # (sequence_parallel, regather_inputs)


def legal_layouts(run: RunConfig, max_ranks: int) -> list[ParallelConfig]:
    """All layouts of at most ``max_ranks`` ranks in which the run can be trained, except `ONE`."""
    schedules, recomputes = _choices("schedule"), _choices("recompute")
    layouts = []
    for sizes in sizes_of(run, max_ranks):
        ways = [way for way in product(schedules, CHUNKS) if _fits(run, _with(sizes, *way))]
        for way, (sequence, regather), recompute in product(ways, SEQUENCE[: 3 if sizes.tp > 1 else 1], recomputes):
            layout = replace(
                _with(sizes, *way), sequence_parallel=sequence, regather_inputs=regather, recompute=recompute
            )
            if not _fits(run, layout):
                continue
            # stages of ZeRO suit every layout with copies
            each = [replace(layout, zero=zero, dp_shard=dp_shard) for zero, dp_shard in _sharding(sizes.dp)]
            layouts += [one for one in each if values_of(one) != values_of(ONE)]
    return layouts


def sizes_of(run: RunConfig, max_ranks: int) -> Iterator[ParallelConfig]:
    """The legal combinations of tp, pp and dp. The dp sizes divide one of them: the batch must suit all."""
    counts = range(1, max_ranks + 1)
    dps = [dp for dp in counts if _fits(run, replace(ONE, dp=dp))]
    most = max(dps, key=lambda dp: (sum(dp % other == 0 for other in dps), dp), default=1)
    for tp, pp, dp in product(counts, counts, dps):
        sizes = replace(ONE, tp=tp, pp=pp, dp=dp)
        if most % dp == 0 and num_ranks(sizes) <= max_ranks and _fits(run, sizes):
            yield sizes


def _sharding(dp: int) -> Iterator[tuple[int, int]]:
    """(zero, dp_shard) to be tried, 0 standing for all ranks; pairs that shard, if there are several of them."""
    yield 0, 0
    if dp > 1:
        yield from ((zero, 0) for zero in STAGES)
        yield from ((zero, 2) for zero in STAGES if dp % 2 == 0 and dp > 2)


def _with(sizes: ParallelConfig, schedule: str, chunks: int) -> ParallelConfig:
    return replace(sizes, schedule=schedule, chunks=chunks)


def _fits(run: RunConfig, layout: ParallelConfig) -> bool:
    return not why_illegal(run, layout)


def _choices(key: str) -> tuple[str, ...]:
    """The values that a key of the layout may have."""
    choices: tuple[str, ...] = next(field for field in fields(ParallelConfig) if field.name == key).metadata["choices"]
    return choices


def values_of(layout: ParallelConfig) -> Values:
    """Where a layout stands on every axis that is varied."""
    p = layout
    sequence = (p.sequence_parallel, p.regather_inputs)
    return (p.tp, sequence, p.pp, p.schedule, num_chunks(p), p.stage_layers, p.dp, p.recompute, p.zero, p.dp_shard)


def covering(layouts: Sequence[ParallelConfig]) -> list[ParallelConfig]:
    """A subset in which every pair of values of two axes that occurs in ``layouts`` occurs; small, not smallest.

    The next is always the one with most pairs that are still missing, of those the one with fewest ranks.
    """
    pairs_of = {layout: set(combinations(enumerate(values_of(layout)), 2)) for layout in layouts}
    missing = set().union(*pairs_of.values())
    chosen = []
    while missing:
        best = max(pairs_of, key=lambda layout: (len(pairs_of[layout] & missing), -num_ranks(layout)))
        chosen.append(best)
        missing -= pairs_of.pop(best)
    return chosen
