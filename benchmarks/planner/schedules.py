"""Published bubbles and peaks of pipeline schedules against our own lists, checked, counted and simulated.

    python benchmarks/planner/schedules.py [--reference ../shared/reference] [--left-out]

Three kinds of rows of the table are predicted:

    formula     a paper's closed form, at several sizes: its bubble against the simulated list's, in the paper's own
                sense; its peak against `peak_activations` of the list
    modelled    a bubble that authors computed from profiled times: ours from `cost.step`'s times of the same model,
                layout and machine, which the table of layouts has; nothing is fitted
    measured    the gain of one schedule over another, where the table of layouts has both runs

A bubble is what the rank that takes longest, from its first computing to its last, idles: the next step may begin
behind it (Qi et al. 2024, section 5.3).
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from statistics import median
from types import MappingProxyType

from published import Row, add_reference, is_missing, of_all, read
from rows import Case, case_of, cases

from megacore.cost.simulate import Durations, simulate
from megacore.cost.step import step_time
from megacore.cost.timeline import Timeline
from megacore.schedule.check import check
from megacore.schedule.generators.generate import generate
from megacore.schedule.live import peak_activations
from megacore.schedule.lower import lower

SIZES = ((2, 8), (4, 12), (8, 32))
"""(ranks, microbatches) at which formulas are held against lists."""
TIMES = ((1.0, 1.0, 1.0), (1.0, 1.2, 0.8))
"""(forward, input gradient, weight gradient) likewise; even times alone where a formula is said to hold for these."""
EVEN = TIMES[:1]

Bubble = Callable[[int, int, float, float, float], float]
Peak = Callable[[int, int], float]


@dataclass(frozen=True)
class Formula:
    """A published closed form: the bubble in units of ``times`` (``of_total``: as a share of the step) and the peak in
    microbatches' activations of a rank, of (ranks, microbatches[, forward, input gradient, weight gradient])."""

    kind: str
    bubble: Bubble | None = None
    peak: Peak | None = None
    chunks: int = 0
    of_total: bool = False
    times: tuple[tuple[float, float, float], ...] = TIMES


def _share(p: int, m: int) -> float:
    return (p - 1) / (m + p - 1)


ONE = Formula("1f1b", lambda p, m, f, b, w: (p - 1) * (f + b + w), lambda p, m: min(p, m))
FORMULAS: Mapping[str, Formula] = MappingProxyType(
    {
        "P0001": Formula("gpipe", lambda p, m, f, b, w: (p - 1) * (f + b + w), lambda p, m: m),
        "P0002": ONE,
        "P0003": Formula(
            "interleaved",
            lambda p, m, f, b, w: (p - 1) * (f + b + w) / 2,
            lambda p, m: p * (1 + (p - 1) / (p * 2)),
            2,
        ),
        # as a share of ideal time (p - 1) / (v m): the same
        "P0004": Formula("interleaved", lambda p, m, f, b, w: (p - 1) * (f + b + w) / 2, None, 2),
        "P0005": ONE,
        "P0006": Formula("zb-h1", lambda p, m, f, b, w: (p - 1) * (f + b - w), lambda p, m: p),
        "P0007": Formula("zb-h2", lambda p, m, f, b, w: (p - 1) * (f + b - 2 * w), lambda p, m: 2 * p - 1),
        "P0008": Formula("zb-v", lambda p, m, f, b, w: 0.0, lambda p, m: p, times=EVEN),
        "P0010": Formula("1f1b", lambda p, m, f, b, w: _share(p, m), lambda p, m: p, of_total=True),
        "P0011": Formula("zb-h1", lambda p, m, f, b, w: _share(p, m) / 3, lambda p, m: p, of_total=True, times=EVEN),
        "P0013": Formula("zb-v", lambda p, m, f, b, w: 0.0, lambda p, m: p, of_total=True, times=EVEN),
        "P0016": ONE,
        # there B is the whole backward: F + B - 2 W = f + b - w
        "P0017": Formula("zb-h1", lambda p, m, f, b, w: (p - 1) * (f + b - w), lambda p, m: p),
        # PP = 2 p stages, each half of a rank; a pair takes both its halves' times
        "P0019": Formula(
            "dualpipe-v", lambda p, m, f, b, w: (p - 1) * (f + 2 * b - w) / 2, lambda p, m: (2 * p + 1) / 2
        ),
    }
)
KINDS: Mapping[str, str] = MappingProxyType(
    {
        "1F1B": "1f1b",
        "1F1B-interleaved": "interleaved-1f1b",
        "ZB-H1": "ZB-1p",
        "ZB-1p": "ZB-1p",
        "ZB-H2": "ZB-2p",
        "ZB-V": "ZB-V",
    }
)
"""Schedules of modelled rows, as the table of layouts names those that our generators make. ZB-1p of the authors is a
search whose published bubbles are those of ZB-H1, to four digits, throughout."""
SEARCHED = "found by the authors' search for the profiled times; we have no generator of it"
UNPRICED = "its configuration is not said, or what it changes is not priced"


@dataclass(frozen=True)
class Line:
    """One predicted value; bubbles are shares of the step, peaks microbatches, gains ratios."""

    id: str
    source: str
    what: str
    published: float
    predicted: float

    @property
    def error(self) -> float:
        """Bubbles: percentage points of the step; others: relative."""
        gap = self.predicted - self.published
        return gap if self.what.startswith("bubble") else gap / self.published


def bubble(timeline: Timeline) -> float:
    """Share of the longest rank's own time that ranks idle."""
    busy = [timeline.busy(rank) for rank in range(len(timeline.start))]
    longest = max(work + idle for work, idle in zip(busy, timeline.rank_idle, strict=True))
    return 1 - sum(busy) / len(busy) / longest


def of_formula(row: Row, formula: Formula) -> list[Line]:
    """At all sizes and times."""
    lines = []
    for p, m in SIZES:
        schedule = check(lower(generate(formula.kind, p, m, formula.chunks)))
        if formula.peak:
            lines.append(
                Line(row["id"], row["source"], "peak of formula", formula.peak(p, m), max(peak_activations(schedule)))
            )
        chunks = len(set(schedule.ranks[0].stage.tolist()) - {-1})
        for f, b, w in formula.times if formula.bubble else ():
            each = Durations(f / chunks, (b + w) / chunks, b / chunks, w / chunks)
            said = formula.bubble(p, m, f, b, w) if formula.bubble else 0.0
            share = said if formula.of_total else said / (m * (f + b + w) + said)
            lines.append(Line(row["id"], row["source"], "bubble of formula", share, bubble(simulate(schedule, each))))
    return lines


def of_model(row: Row, runs: Iterable[Case]) -> Line:
    """A modelled bubble: of the model, ranks and microbatches that the table of layouts has for the same experiment's
    interleaved (or ZB-V) run, with the schedule of the row. Raises ValueError where it cannot be predicted."""
    if row["schedule"] == "ZB-2p":
        raise ValueError(SEARCHED)
    found = re.match(r"(\S+) p(\d+) m=(\d+) A100", row["measured_config"])
    if not found:
        raise ValueError(UNPRICED)
    size, p, m = found[1], int(found[2]), int(found[3])
    kind = row["schedule"]
    for case in runs:
        train = case.config.train
        microbatches = train.global_batch_size // (train.micro_batch_size * case.layout.dp)
        profiled = "ZB-V" if kind == "ZB-V" else "interleaved-1f1b"
        said = (case.row["model"], case.layout.pp, case.row["schedule"], microbatches)
        if said != (f"GPT-{size}", p, profiled, m):
            continue
        if KINDS[kind] != profiled:
            case = case_of({**case.row, "schedule": KINDS[kind], "vpp": "1"})
        timeline = step_time(case.config, case.layout, case.machine, case.practice).timeline
        assert timeline is not None
        return Line(row["id"], row["source"], f"bubble of {kind}", float(row["measured_value"]), bubble(timeline))
    raise ValueError("the table of layouts has no run of it, which would say the microbatch")


def of_gain(row: Row, runs: Iterable[Case]) -> Line:
    """The gain of interleaving on 512 H100s, between two rows of the table of layouts."""
    found = re.fullmatch(r"([\d.]+) -> ([\d.]+)", row["measured_value"])
    if row["schedule"] != "1F1B -> interleaved 1F1B" or not found:
        raise ValueError(UNPRICED)
    rates: dict[str, float] = {}
    for case in runs:
        of = case.row
        if (of["gpus"], of["seq_len"], of["micro_batch"]) == ("512", "8192", "") and "405B" in of["model"]:
            if of["schedule"].startswith("interleaved"):
                case = case_of({**of, "vpp": of["vpp"] or "2"})  # the least, where it is not said
            seconds = step_time(case.config, case.layout, case.machine, case.practice).seconds
            rates[case.config.parallel.schedule] = 1 / seconds
    if not {"1f1b", "interleaved"} <= set(rates):
        raise ValueError("the table of layouts has not both runs")
    gain = rates["interleaved"] / rates["1f1b"]
    return Line(row["id"], row["source"], "gain of throughput", float(found[2]) / float(found[1]), gain)


def compare(folder: Path) -> tuple[list[Line], list[str]]:
    """All rows that can be predicted, and why others are left out."""
    runs = cache(lambda: cases(folder)[0])

    def of_row(row: Row) -> list[Line]:
        if row["kind"] != "formula":
            return [(of_model if row["kind"] == "modelled" else of_gain)(row, runs())]
        if row["id"] not in FORMULAS:
            raise ValueError("no generator of this schedule, or no figure of one")
        return of_formula(row, FORMULAS[row["id"]])

    lines, left = of_all(
        read(folder / "schedules.csv"), of_row, lambda row: f"{row['id']} {row['schedule']} ({row['source']})"
    )
    return list(chain.from_iterable(lines)), left


def report(lines: Iterable[Line]) -> str:
    """Errors by source and by what is predicted."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.source, line.what), []).append(line)
    told = [f"{'source':42s} {'what':28s} {'rows':>4s} {'values':>6s}  {'median':>7s} {'worst':>7s}"]
    for (source, what), some in groups.items():
        sizes = [abs(line.error) for line in some]
        rows = len({line.id for line in some})
        told.append(f"{source:42.42s} {what:28s} {rows:4d} {len(some):6d}  {median(sizes):7.1%} {max(sizes):7.1%}")
    told.append("errors of bubbles are percentage points of the step; of peaks and gains, relative")
    return "\n".join(told)


def main(argv: list[str] | None = None) -> int:
    """Print the errors, and how many rows are left out."""
    parser = argparse.ArgumentParser(description="predicted bubbles and peaks of schedules against published ones")
    add_reference(parser)
    parser.add_argument("--left-out", action="store_true", help="name the rows that are left out, and why")
    arguments = parser.parse_args(argv)
    if is_missing(arguments.reference / "schedules.csv"):
        return 2
    lines, left = compare(arguments.reference)
    print(report(lines))
    print(f"{len(left)} rows are left out" + (":" if arguments.left_out else " (--left-out says which, and why)"))
    if arguments.left_out:
        print(*left, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
