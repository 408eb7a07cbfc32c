"""What is shown of a verification: the head, a line per layout as it ends, and the verdict."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megacore.monitor.console import Paint, colourful, human_count, human_time, pad, plain
from megacore.spec import ModelSpec
from megacore.verify.outcome import Outcome
from megacore.verify.plan import Plan, Trial
from megacore.verify.twin import describe

HEADS = ("layout", "ranks", "stages", "schedule", "recompute", "micro", "worst parameter", "of bound", "loss", "time")
NUMBERS = ("ranks", "stages", "micro", "of bound", "loss", "time")
SHARP = (
    "float64: of each gradient and updated weight |a - b| <= 1e-10 max(|b|, 1e-4 global norm); loss and norm to 1e-10"
)
AS_RUN = "as run, {dtype}: each parameter's distance from float64 at most twice that of one process in {dtype}"


def name_of(path: str | None, preset: str | None) -> str:
    """The run by the words of the command line."""
    return " on ".join(filter(None, [path, preset])) or "the overrides' run"


def head(plan: Plan, name: str, width: int) -> list[str]:
    """What is compared with what, in lines of at most ``width`` columns."""
    t, whole, m = plan.single[0].config.train, plan.run.train, plan.run.model
    num, num_whole = plan.num_microbatches, whole.global_batch_size // whole.micro_batch_size
    twins = [trial.config for trial in plan.single]
    count = f"{num} microbatches" if num == num_whole else f"{num} microbatches (the run has {num_whole})"
    size = human_count(ModelSpec.of(m).num_params)
    facts = {
        "run": f"{name}: {m.family}, {size} parameters in {m.num_layers} layers",
        "twin": f"{plan.twin}: computed with the same features and remainders, but in {describe(twins, plan.run)}",
        "data": plan.data,
        "batch": f"{count} of {t.micro_batch_size} x {t.seq_len} tokens, the same for every layout",
        "layouts": number_of_layouts(plan),
        "bound": SHARP if plan.dtype == "fp64" else AS_RUN.format(dtype=plan.dtype),
    }
    if not plan.twin:
        del facts["twin"]
    lines = []
    for name, fact in facts.items():
        lines += textwrap.wrap(f"{name:<9}{fact}", width, subsequent_indent=" " * 9, break_long_words=False)
    return lines


def number_of_layouts(plan: Plan) -> str:
    """How many layouts are tried, and how many are left out."""
    num = len(plan.trials)
    if not plan.num_legal:
        return f"{num} as named"
    if num >= plan.num_legal:
        return f"all {num} that are legal"
    return (
        f"{num} in which all pairs of values of tp, sequence, pp, schedule, chunks, dp and recompute meet; "
        f"{plan.num_legal - num} more are legal (--layouts names any)"
    )


@dataclass(frozen=True)
class Table:
    """Lines of aligned columns, wide enough for what the trials will fill in."""

    widths: tuple[int, ...]
    colour: bool

    @classmethod
    def of(cls, plan: Plan, colour: bool) -> "Table":
        """A table for all trials of a plan."""
        rows = [HEADS, *((*_layout_cells(trial), *[""] * 4) for trial in plan.trials)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
        params = [_short(param.name) for one in plan.single for param in ModelSpec.of(one.config.model).params]
        for head, width in (("loss", len("1e-16")), ("time", len("1h07m "))):
            widths[HEADS.index(head)] = width
        widths[HEADS.index("worst parameter")] = max(len("worst parameter"), *map(len, params))
        return cls(tuple(widths), colour)

    @property
    def paint(self) -> Paint:
        """With or without colours."""
        return colourful if self.colour else plain

    def header(self) -> str:
        """The names of the columns."""
        return self.paint(f"    {self._row(HEADS)}".rstrip(), "dim")

    def lines(self, outcome: Outcome) -> Iterator[str]:
        """A layout's line; where it does not agree, below it why."""
        mark = self.paint("✓", "green") if outcome.agrees else self.paint("✗", "red", "bold")
        figures = (
            _short(outcome.parameter),
            number(outcome.excess),
            f"{outcome.loss_difference:.0e}" if outcome.loss_difference else "0",
            human_time(outcome.seconds),
        )
        yield f"  {mark} {self._row((*_outcome_cells(outcome), *figures))}".rstrip()
        for problem in problems_of(outcome):
            yield "      " + self.paint(problem, "red")

    def _row(self, cells: Sequence[str]) -> str:
        return "  ".join(
            cell.rjust(width) if head in NUMBERS else pad(cell, width)
            for head, cell, width in zip(HEADS, cells, self.widths, strict=True)
        )


def number(value: float) -> str:
    """Small numbers by their size, others by their digits."""
    return "0" if value == 0 else f"{value:.1e}" if value < 1e-2 else f"{value:.3g}"


def _layout_cells(trial: Trial) -> tuple[str, ...]:
    p = trial.config.parallel
    numbers = (str(trial.num_ranks), str(trial.num_stages), schedule_name(p.schedule))
    return (trial.label, *numbers, p.recompute, str(trial.num_microbatches))


def _outcome_cells(outcome: Outcome) -> tuple[str, ...]:
    o = outcome
    return (o.label, str(o.ranks), str(o.stages), schedule_name(o.schedule), o.recompute, str(o.microbatches))


def schedule_name(schedule: str) -> str:
    """A kind, or the name of a user's own file."""
    return Path(schedule).name


def _short(name: str) -> str:
    """A parameter's name without what most of them have in common."""
    return name.removeprefix("layers.").removesuffix(".weight")


def problems_of(outcome: Outcome) -> Iterator[str]:
    """Why a layout does not agree, one line each."""
    if not outcome.excess <= 1:
        others = f", and {outcome.num_beyond - 1} more parameters are beyond it" if outcome.num_beyond > 1 else ""
        yield f"{outcome.parameter}: the {outcome.what} differs by {outcome.excess:.3g} times the bound{others}"
    yield from outcome.problems


def verdict(outcomes: Sequence[Outcome], paint: Paint) -> str:
    """The last line."""
    wrong = [outcome for outcome in outcomes if not outcome.agrees]
    if not wrong:
        worst = max(outcome.excess for outcome in outcomes)
        many = "the layout computes" if len(outcomes) == 1 else f"all {len(outcomes)} layouts compute"
        return (
            paint(f"✓ {many} what one process computes", "green", "bold") + f" (at worst {number(worst)} of the bound)"
        )
    again = "; ".join(outcome.layout for outcome in wrong)
    return (
        paint(f"✗ {len(wrong)} of {len(outcomes)} layouts do not compute what one process computes", "red", "bold")
        + f'\n  these alone: --layouts "{again}"'
    )
