"""What is compared with what: from the user's run and layouts to the runs of one step that the ranks carry out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path

from megacore.config.errors import ConfigError
from megacore.config.pipeline import is_own_schedule, num_chunks
from megacore.config.resolve import resolve
from megacore.config.schema import (
    CheckpointConfig,
    LogConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
)
from megacore.config.settings import settings
from megacore.verify.covering import covering, legal_layouts, values_of
from megacore.verify.layouts import ONE, filled_in, label_of, num_ranks, read_layouts, text_of, why_illegal
from megacore.verify.machine import too_large
from megacore.verify.twin import shrunk

FEW = 2
"""Microbatches per pipeline rank, at least: a schedule then has a steady phase, and gradients are accumulated."""


@dataclass(frozen=True)
class Trial:
    """One layout's complete run of one step, its words for ``--layouts`` and a short name for people.

    ``role`` is ``exact`` for one process in float64, which others are held against, ``own`` for one process in the
    run's dtype (with --as-run), else ``tried``.
    """

    text: str
    label: str
    config: RunConfig
    role: str

    @property
    def num_ranks(self) -> int:
        """Ranks that it takes."""
        return num_ranks(self.config.parallel)

    @property
    def num_stages(self) -> int:
        """Stages of its pipeline."""
        return self.config.parallel.pp * num_chunks(self.config.parallel)

    @property
    def num_microbatches(self) -> int:
        """Microbatches of each dp rank."""
        t = self.config.train
        return t.global_batch_size // (t.micro_batch_size * max(1, self.config.parallel.dp))

    @property
    def model(self) -> str:
        """Who has the same computes the same: twins differ by their layers alone."""
        return f"layers-{self.config.model.num_layers}"


@dataclass(frozen=True)
class Plan:
    """``run`` is what the user asked for; computed is the same, or its twins, for the reason ``twin``. ``single`` are
    the runs of one process, for each model that is computed, and ``trials`` the layouts held against them."""

    run: RunConfig
    twin: str
    data: str
    single: tuple[Trial, ...]
    trials: tuple[Trial, ...]
    num_legal: int = 0  # of which the trials were chosen; 0: the user chose

    @property
    def computed(self) -> tuple[Trial, ...]:
        """All that is computed, in order."""
        return (*self.single, *self.trials)

    @property
    def num_ranks(self) -> int:
        """The processes that all of it takes."""
        return max(trial.num_ranks for trial in self.trials)

    @property
    def num_microbatches(self) -> int:
        """Microbatches of the whole batch."""
        return self.single[0].num_microbatches

    @property
    def dtype(self) -> str:
        """What the layouts compute in."""
        return self.trials[0].config.precision.dtype


def make_plan(run: RunConfig, named: str | None, max_ranks: int, shrink: bool | None, as_run: bool) -> Plan:
    """The plan for a run as `load` gives it.

    ``named`` is what ``--layouts`` says; None: a choice of all legal ones. ``shrink`` None: where the machine is too
    small. Raises ConfigError with everything that is wrong with the run, its data or the layouts.
    """
    problems: list[str] = []
    layouts, num_legal = choose(as_one_step(run), named, max_ranks, problems)
    run, data = with_data(as_one_step(run), problems)
    if as_run and run.precision.fp8 != "off":
        problems.append(
            f"precision.fp8={run.precision.fp8} rounds so coarsely that rounding differences between layouts tip codes "
            "over, which --as-run would take for errors; leave --as-run out, or set precision.fp8=off"
        )
    if problems:
        raise ConfigError(problems)
    run = replace(run, model=resolve(replace(run, parallel=ONE), 1).model)
    few = reduced(run, layouts)
    reason = too_large(few, layouts) if shrink is None else "as asked" if shrink else ""
    models = [few] * len(layouts)
    if reason:
        models = [reduced(shrunk(run, layout, layouts), layouts, is_twin=True) for layout in layouts]
        data = f"made-up tokens of seed {run.train.seed}: the twin has a vocabulary of its own"
    as_run = as_run and run.precision.dtype != "fp64"
    distinct = {model.model.num_layers: model for model in models}.values()
    single = [trial(exact(model), ONE, "exact") for model in distinct]
    single += [trial(model, ONE, "own") for model in distinct if as_run]
    laid_out = (model if as_run else exact(model) for model in models)
    trials = tuple(trial(model, layout, "tried") for model, layout in zip(laid_out, layouts, strict=True))
    return Plan(run, reason, data, tuple(single), trials, num_legal)


def exact(run: RunConfig) -> RunConfig:
    """The run in float64."""
    return replace(run, precision=PrecisionConfig(dtype="fp64"))


def trial(run: RunConfig, layout: ParallelConfig, role: str) -> Trial:
    """One layout's run, checked once more: now with its reduced batch, and perhaps a twin's sizes.

    Raises ValueError if a user's own list of instructions does not fit.
    """
    if problems := why_illegal(run, layout):
        raise AssertionError(f"layout {text_of(layout)} is legal for the run, but not as it is verified: {problems}")
    config = resolve(replace(run, parallel=layout), num_ranks(layout))
    made = Trial(text_of(layout), label_of(layout), config, role)
    if is_own_schedule(layout):
        from megacore.train.schedule import plan_schedule  # brings numpy

        plan_schedule(config, made.num_microbatches)
    return made


def as_one_step(run: RunConfig) -> RunConfig:
    """The run as far as one step goes. SGD in place of the optimizer: what divides by a gradient's size makes round-off
    as large as signal where a gradient is nearly zero."""
    o = run.optim
    weight_decay = settings(o).get("weight_decay", 0.0)
    return replace(
        run,
        train=replace(run.train, steps=1, eval_every=0),
        optim=OptimConfig(name="sgd", lr=o.lr, weight_decay=weight_decay, clip_grad=o.clip_grad),
        checkpoint=CheckpointConfig(),
        log=LogConfig(),
    )


def choose(run: RunConfig, named: str | None, max_ranks: int, problems: list[str]) -> tuple[list[ParallelConfig], int]:
    """The layouts to try, fewest ranks first, and of how many they were chosen (0: the user named them). What is wrong
    becomes lines of ``problems``."""
    if max_ranks < 1:
        problems.append(f"--max-ranks={max_ranks} must be at least 1")
    broken = why_illegal(run, ONE)
    if named is not None:
        layouts = read_layouts(named, run.parallel, problems)
        problems += broken or [line for name, one in layouts.items() for line in _unfit(run, name, one, max_ranks)]
        return sorted(layouts.values(), key=num_ranks), 0
    problems += broken
    if problems:
        return [], 0
    legal = legal_layouts(run, max_ranks)
    chosen = covering(legal)
    p = run.parallel
    own = filled_in({"tp": p.tp, "pp": p.pp, "cp": p.cp, "ep": p.ep, "dp": max(1, p.dp), "dp_shard": p.dp_shard}, p)
    is_new = values_of(own) not in {values_of(layout) for layout in (ONE, *chosen)}
    if is_new and not _unfit(run, "", own, max_ranks):
        chosen.append(own)
    return sorted(chosen, key=num_ranks), len(legal)


def _unfit(run: RunConfig, name: str, layout: ParallelConfig, max_ranks: int) -> list[str]:
    """What keeps a layout from being tried."""
    lines = why_illegal(run, layout)
    needed = num_ranks(layout)
    if needed > max_ranks:
        lines.append(f"needs {needed} ranks, more than --max-ranks={max_ranks}; give --max-ranks={needed}")
    return [f"layout {name}: {line}" for line in lines]


def with_data(run: RunConfig, problems: list[str]) -> tuple[RunConfig, str]:
    """The run with its data, or without any if they are not here, and where its tokens come from."""
    prefixes = [prefix for _, prefix in run.data.blend]
    missing = [prefix for prefix in prefixes if not all(Path(prefix + end).is_file() for end in (".bin", ".idx"))]
    if prefixes and not missing:
        from megacore.data.run_data import fill_in  # brings numpy

        try:
            return fill_in(run), "the first samples of the run's own data"
        except ConfigError as error:
            problems += error.problems
            return run, ""
    why = f"{missing[0]}.bin or .idx is not here" if missing else "the run names no data"
    if not run.model.vocab_size:
        problems.append(f"model.vocab_size=0 is to come from the data, but {why}; give the data or model.vocab_size")
    data = replace(run.data, blend=(), eval_blend=(), fim_rate=0.0)
    return replace(run, data=data), f"made-up tokens of seed {run.train.seed}: {why}"


def reduced(run: RunConfig, layouts: Sequence[ParallelConfig], is_twin: bool = False) -> RunConfig:
    """The run with as many microbatches as its layouts need, but no more than it has (a twin may have more): the same
    number for all, which every dp divides."""
    t = run.train
    whole = t.global_batch_size // t.micro_batch_size
    unit = lcm(*(max(1, layout.dp) for layout in layouts))
    wanted = max(max(1, layout.dp) * FEW * layout.pp for layout in layouts)
    num = -(-wanted // unit) * unit
    if any(is_own_schedule(layout) for layout in layouts):  # such a list is for the run's own number
        num = whole
    elif not is_twin:
        num = min(num, whole)
    return replace(run, train=replace(t, global_batch_size=num * t.micro_batch_size, batch_ramp=()))
