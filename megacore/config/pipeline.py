"""What a pipeline may look like: the one statement of its rules, for a run file and for what is built of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from megacore.config.schema import OWN_SCHEDULE, ParallelConfig

V_SHAPED = ("zb-v", "dualpipe-v")
"""Schedules whose ranks hold two stages each: the layers go down the ranks and come up again."""


def is_own_schedule(parallel: ParallelConfig) -> bool:
    """Whether the schedule is read from a file rather than generated."""
    return parallel.schedule.endswith(OWN_SCHEDULE)


def num_chunks(parallel: ParallelConfig) -> int:
    """Stages of each pipeline rank, given or derived."""
    return parallel.chunks or (2 if parallel.schedule in V_SHAPED else 1)


def schedule_problems(parallel: ParallelConfig, batch_ramp: Sequence[int]) -> Iterator[str]:
    """What keeps the schedule from being made, one line each."""
    what = f"parallel.schedule={parallel.schedule}"
    if parallel.schedule in V_SHAPED and num_chunks(parallel) != 2:
        yield (
            f"parallel.chunks={parallel.chunks} does not go with {what}, whose ranks hold 2 stages each; leave it out, "
            "or use interleaved"
        )
    if not is_own_schedule(parallel):
        return
    if not Path(parallel.schedule).is_file():
        yield f"{what} is no file; give the path of a list of instructions (`megacore schedule KIND --text` prints one)"
    if batch_ramp:
        yield (
            f"train.batch_ramp={list(batch_ramp)} changes the number of microbatches, but {what} is a list for one "
            "number; leave the ramp out, or name a kind of schedule"
        )


def cut_problem(num_layers: int, num_stages: int, stage_layers: Sequence[int] = ()) -> str:
    """What keeps ``num_layers`` from being cut into ``num_stages`` (of ``stage_layers`` each, if given), else nothing.

    Stage 0 also holds the embedding and the last stage the head with the loss, so these two may do without layers; a
    stage between them has one at least.
    """
    if num_stages > num_layers + 2:
        return (
            f"parallel.pp*chunks makes {num_stages} stages, too many for model.num_layers={num_layers} with an "
            f"embedding and a head; use at most {num_layers + 2}"
        )
    if not stage_layers:
        return ""
    what = f"parallel.stage_layers={list(stage_layers)}"
    if len(stage_layers) != num_stages or sum(stage_layers) != num_layers:
        return (
            f"{what} has {len(stage_layers)} counts that sum to {sum(stage_layers)}; it must have {num_stages} "
            f"(parallel.pp*chunks) that sum to model.num_layers={num_layers}; leave it out for a balanced split"
        )
    if min(stage_layers) < 0 or 0 in stage_layers[1:-1]:
        return (
            f"{what} leaves a stage empty; only the first, which has the embedding, and the last, which has the head, "
            "may have 0 layers"
        )
    return ""
