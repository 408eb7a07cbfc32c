"""What pictures on paper and in terminals say alike."""

from megacore.cost.plot.boxes import num_chunks
from megacore.cost.timeline import Timeline
from megacore.schedule.schedule import Schedule


def shape_of(schedule: Schedule) -> str:
    """The kind and the counts: "1f1b: 4 ranks × 1 chunk × 8 microbatches"."""
    counts = (
        (schedule.num_ranks, "rank", "ranks"),
        (num_chunks(schedule), "chunk", "chunks"),
        (schedule.num_microbatches, "microbatch", "microbatches"),
    )
    return f"{schedule.kind}: " + " × ".join(f"{count} {one if count == 1 else more}" for count, one, more in counts)


def figures_of(timeline: Timeline, unit: str = "", factor: float = 1.0) -> str:
    """The bubble and the makespan, which is multiplied by ``factor`` to be in ``unit``."""
    return f"bubble {timeline.bubble_fraction:.1%}, makespan {number(timeline.makespan * factor)} {unit}".rstrip()


def idle_shares(timeline: Timeline) -> tuple[float, ...]:
    """Of each rank, the share of the makespan without computing. Their mean is the bubble fraction."""
    whole = timeline.makespan
    return tuple(1 - timeline.busy(rank) / whole if whole else 0.0 for rank in range(len(timeline.start)))


def number(value: float) -> str:
    """Four digits, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
