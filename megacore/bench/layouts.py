"""`megacore bench layouts`, second part: what a sweep found, beside what the planner predicts of it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from megacore.bench.harness import quartiles_of
from megacore.bench.layout_trials import Record, Results, Trial
from megacore.config.schema import RunConfig
from megacore.data.indexed import IndexedWriter

COLUMNS = (
    "layout",
    "ranks",
    "tp",
    "pp",
    "dp",
    "schedule",
    "zero",
    "status",
    "reason",
    "rounds",
    "best_s",
    "first_quartile_s",
    "median_s",
    "third_quartile_s",
    "tokens_per_s",
    "memory_gb",
    "predicted_s",
)


@dataclass(frozen=True)
class Measured:
    """One layout: a median of its steps for each round that succeeded, or why none did; ``predicted`` is the planner's
    time of a step (None: it was not asked)."""

    trial: Trial
    rounds: tuple[float, ...]
    status: str
    reason: str = ""
    memory_gb: float | None = None
    predicted: float | None = None

    @property
    def median(self) -> float | None:
        """Seconds of a step: of the rounds' medians."""
        return statistics.median(self.rounds) if self.rounds and self.status == "ok" else None

    @property
    def tokens_per_s(self) -> float | None:
        """Of all ranks together."""
        train = self.trial.config.train
        return train.global_batch_size * train.seq_len / self.median if self.median else None

    def row(self) -> dict[str, Any]:
        """As layouts.csv has it."""
        p = self.trial.config.parallel
        first, third = quartiles_of(self.rounds) if self.rounds else (None, None)
        values = (
            self.trial.text,
            self.trial.num_ranks,
            p.tp,
            p.pp,
            max(1, p.dp),
            p.schedule if p.pp > 1 else "",
            p.zero,
            self.status,
            self.reason,
            len(self.rounds),
            min(self.rounds, default=None),
            first,
            self.median,
            third,
            self.tokens_per_s,
            self.memory_gb,
            self.predicted,
        )
        return dict(zip(COLUMNS, values, strict=True))


def made_up_data(run: RunConfig, folder: Path, steps: int) -> str:
    """The prefix of random tokens, enough for ``steps`` steps; made once. Raises ValueError without a vocabulary."""
    import numpy as np

    if not run.model.vocab_size:
        raise ValueError("model.vocab_size=0 is to come from the data, and there is none; give data.blend or the size")
    prefix = folder / "made-up"
    if not prefix.with_suffix(".idx").exists():
        train = run.train
        num_tokens = max(1 << 16, 2 * (steps + 8) * train.global_batch_size * (train.seq_len + 1))
        dtype = np.uint16 if run.model.vocab_size <= 1 << 16 else np.int32
        folder.mkdir(parents=True, exist_ok=True)
        with IndexedWriter(str(prefix), dtype) as writer:
            for number in range(16):
                random = np.random.default_rng(number)
                writer.add_document(random.integers(run.model.vocab_size, size=-(-num_tokens // 16)))
    return str(prefix)


def collect(trials: Sequence[Trial], results: Results, predicted: Mapping[str, float]) -> list[Measured]:
    """What is known of every trial, fastest first, then what failed."""
    found = []
    for trial in trials:
        own = [record for (name, _), record in sorted(results.records.items()) if name == trial.text]
        bad: Record | None = results.failed(trial.text)
        rounds = tuple(record.median for record in own if record.median is not None)
        memory = max((record.memory_gb for record in own if record.memory_gb is not None), default=None)
        status, reason = ("ok", "") if rounds else ("missing", "the sweep has not come to it")
        if bad is not None:
            status, reason = bad.status, bad.reason
        found.append(Measured(trial, rounds, status, reason, memory, predicted.get(trial.text)))
    return sorted(found, key=lambda one: (one.median is None, one.median or 0.0))


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """How far two rankings of the same things agree (Kendall 1938, tau-b): 1 the same, -1 reversed; None for fewer than
    two things, or where one of them does not distinguish any."""
    agree = differ = ties_of_first = ties_of_second = 0
    for (a, b), (c, d) in combinations(zip(first, second, strict=True), 2):
        x, y = (a > c) - (a < c), (b > d) - (b < d)
        agree, differ = agree + (x * y > 0), differ + (x * y < 0)
        ties_of_first, ties_of_second = ties_of_first + (x == 0), ties_of_second + (y == 0)
    pairs = len(first) * (len(first) - 1) // 2
    scale = ((pairs - ties_of_first) * (pairs - ties_of_second)) ** 0.5
    return (agree - differ) / scale if scale else None


@dataclass(frozen=True)
class Ranking:
    """How the planner's ranking agrees with the measured one."""

    tau: float | None
    tau_of_halves: float | None
    """Of one half of the rounds with the other: what measuring alone would agree with itself."""
    number: int
    best_by_plan: str
    loss: float
    """How much slower the planner's choice was than the fastest, 0.1 being 10%."""
    error: float
    """Median of |predicted / measured - 1|."""


def compare(found: Sequence[Measured]) -> Ranking | None:
    """None where fewer than two layouts have both times."""
    both = [(one, one.median, one.predicted) for one in found if one.median and one.predicted]
    if len(both) < 2:
        return None
    measured, predicted = [median for _, median, _ in both], [time for _, _, time in both]
    chosen = min(both, key=lambda each: each[2])
    halves = [(one.rounds[::2], one.rounds[1::2]) for one, _, _ in both]
    of_halves = None
    if all(even and odd for even, odd in halves):
        of_halves = kendall_tau(*zip(*((statistics.median(even), statistics.median(odd)) for even, odd in halves)))
    return Ranking(
        kendall_tau(measured, predicted),
        of_halves,
        len(both),
        chosen[0].trial.label,
        chosen[1] / min(measured) - 1,
        statistics.median(abs(time / median - 1) for _, median, time in both),
    )


def table(found: Sequence[Measured]) -> str:
    """For the terminal."""
    width = max([6, *(len(one.trial.label) for one in found)])
    lines = [f"{'layout':{width}}  ranks   median s  quartiles s      tokens/s  predicted s"]
    for one in found:
        head = f"{one.trial.label:{width}}  {one.trial.num_ranks:5}"
        if one.median is None or one.tokens_per_s is None:
            lines.append(f"{head}  {one.status}: {one.reason}")
            continue
        first, third = quartiles_of(one.rounds)
        predicted = "" if one.predicted is None else f"{one.predicted:11.3f}"
        lines.append(
            f"{head}   {one.median:8.3f}  {first:6.3f} {third:6.3f}   {one.tokens_per_s:9.0f}  {predicted}".rstrip()
        )
    if ranking := compare(found):
        lines += ["", words(ranking)]
    return "\n".join(lines)


def words(ranking: Ranking) -> str:
    """What the comparison says."""
    tau = "undefined" if ranking.tau is None else f"{ranking.tau:.2f}"
    own = (
        ""
        if ranking.tau_of_halves is None
        else f" (one half of the rounds with the other: {ranking.tau_of_halves:.2f})"
    )
    return (
        f"predicted and measured ranking of {ranking.number} layouts: Kendall tau {tau}{own}; the planner's choice, "
        f"{ranking.best_by_plan}, is {ranking.loss:.1%} slower than the fastest; median error of times "
        f"{ranking.error:.0%}"
    )


def as_dict(one: Measured) -> dict[str, Any]:
    """Plain data, with every round."""
    return {**one.row(), "seconds": list(one.rounds)}
