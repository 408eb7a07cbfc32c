"""The schedule of a run: generated or read from the user's own file, lowered, and checked before anything runs."""

from hashlib import sha256
from pathlib import Path

from megacore.config.pipeline import is_own_schedule
from megacore.config.schema import RunConfig
from megacore.schedule.check import check
from megacore.schedule.generators.generate import generate
from megacore.schedule.instruction import Op
from megacore.schedule.lower import lower
from megacore.schedule.schedule import Schedule
from megacore.schedule.text import from_text


def num_microbatches(config: RunConfig) -> int:
    """Microbatches that a pipeline takes through each step of a resolved run, behind its ramp."""
    t = config.train
    return t.global_batch_size // (t.micro_batch_size * config.parallel.dp)


def plan_schedule(config: RunConfig, num_microbatches: int) -> Schedule:
    """What every pipeline rank of a resolved run does in a step of ``num_microbatches``: lowered and checked.

    Raises ValueError if the user's own list is wrong or was made for another run.
    """
    schedule, tied = draft_schedule(config, num_microbatches), config.model.tie_embeddings
    try:
        return check(lower(schedule, tied))
    except ValueError as error:
        raise _of_file(config, error) from None


def own_schedule_hash(config: RunConfig) -> str:
    """A hash of the user's own list, which every rank reads for itself; '' where there is none."""
    if not is_own_schedule(config.parallel):
        return ""
    return sha256(Path(config.parallel.schedule).read_bytes()).hexdigest()[:16]


def draft_schedule(config: RunConfig, num_microbatches: int) -> Schedule:
    """The same as it was generated or written, to be priced and drawn: without messages, unless a user wrote them."""
    parallel = config.parallel
    if not is_own_schedule(parallel):
        return generate(parallel.schedule, parallel.pp, num_microbatches, parallel.chunks)
    path = Path(parallel.schedule)
    try:
        schedule = from_text(path.read_text(encoding="utf-8"), kind=path.name)
    except OSError as error:
        raise ValueError(f"parallel.schedule={path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # UnicodeDecodeError is one
        raise _of_file(config, error) from None
    check_own_schedule(schedule, config, num_microbatches)
    return schedule


def check_own_schedule(schedule: Schedule, config: RunConfig, num_microbatches: int) -> None:
    """Raise ValueError if a user's own list is for another run: ranks, stages, microbatches, or tied weights."""
    p, t, what = config.parallel, config.train, f"parallel.schedule={config.parallel.schedule}"
    if schedule.num_ranks != p.pp:
        raise ValueError(
            f"{what} has lists for {schedule.num_ranks} ranks, but parallel.pp={p.pp}; set pp={schedule.num_ranks}, or "
            "write a list for each rank"
        )
    stages = [schedule.home.count(rank) for rank in range(p.pp)]
    if stages != [p.chunks] * p.pp:
        fix = f"set chunks={stages[0]}" if len(set(stages)) == 1 else "give every rank the same number"
        raise ValueError(
            f"{what} forwards {', '.join(map(str, stages))} stages on its ranks, but parallel.chunks={p.chunks}; {fix}"
        )
    if schedule.num_microbatches != num_microbatches:
        size = schedule.num_microbatches * t.micro_batch_size * p.dp
        raise ValueError(
            f"{what} is for {schedule.num_microbatches} microbatches, but train.global_batch_size="
            f"{t.global_batch_size} / (micro_batch_size*dp={t.micro_batch_size}*{p.dp}) makes {num_microbatches}; "
            f"set global_batch_size={size}"
        )
    if not schedule.trains:
        raise ValueError(f"{what} only forwards; add the backwards (B, or I and W)")
    _check_tied(schedule, config)


def _check_tied(schedule: Schedule, config: RunConfig) -> None:
    """A list that comes with its messages must know whether weights are tied: `check` cannot."""
    ops = {op for rank in schedule.ranks for op in rank.op.tolist()}
    first, last = schedule.home[0], schedule.home[-1]
    wanted = config.model.tie_embeddings and first != last
    if Op.OPTIMIZE in ops and wanted != (Op.TIED in ops):
        has, fix = ("lacks", "add") if wanted else ("has", "leave out")
        raise ValueError(
            f"parallel.schedule={config.parallel.schedule} {has} sums of tied weights, but model.tie_embeddings="
            f"{str(config.model.tie_embeddings).lower()}; {fix} T0~{last} on rank {first} and "
            f"T{schedule.num_stages - 1}~{first} on rank {last}, or leave out everything but F, B, I, W and FB"
        )


def _of_file(config: RunConfig, error: ValueError) -> ValueError:
    """The error as the user's, if the list is."""
    if not is_own_schedule(config.parallel):
        return error
    return ValueError(f"parallel.schedule={config.parallel.schedule}: {error}")
