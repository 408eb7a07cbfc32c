"""Predicted step times against published ones: every row of the reference tables that says enough.

    python benchmarks/planner/validate.py [--reference ../shared/reference] [--out TABLE.csv] [--plot SCATTER.svg]

The constants are the same for all rows (`roofline.py`, `blocks.py`, `step.py`, `machine.py` in `megacore/cost`).
Errors stand in three columns:

    as it is     nothing is fitted to a source: what a source that nobody has seen may expect
    scaled       one factor for each source and version of its software, the geometric mean of its first two rows
    others       the factor of a source is the median of all other sources': cross-validation by source

Kendall's tau compares the order of layouts: of rows of one model on as many devices, which differ in layout only.
"""

import argparse
import csv
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median

from published import add_reference, is_missing
from rows import Case, cases

from megacore.cost.step import step_time

FITTED = 2
"""Rows of a source and version that its factor is taken from."""
OUT_OF_SIGHT = 0.02
"""Published times closer than this say nothing of an order."""


@dataclass(frozen=True)
class Prediction:
    """Of one case: seconds, and whether its source's factor was taken from it."""

    case: Case
    seconds: float
    factor: float
    others: float
    fitted: bool

    @property
    def error(self) -> float:
        """Of nothing fitted."""
        return self.seconds / self.case.seconds - 1

    @property
    def scaled_error(self) -> float:
        """With its source's factor."""
        return self.seconds * self.factor / self.case.seconds - 1

    @property
    def others_error(self) -> float:
        """With the factor of all other sources."""
        return self.seconds * self.others / self.case.seconds - 1


def predict(found: Sequence[Case], simulate: bool = False) -> list[Prediction]:
    """Every case, with the factors of its source."""
    seconds = [step_time(one.config, one.layout, one.machine, one.practice, simulate).seconds for one in found]
    ratios: dict[tuple[str, str], list[float]] = {}
    medians: dict[str, list[float]] = {}
    for one, predicted in zip(found, seconds, strict=True):
        ratios.setdefault(one.version, []).append(one.seconds / predicted)
        medians.setdefault(one.source.name, []).append(one.seconds / predicted)
    typical = {name: median(each) for name, each in medians.items()}
    factors = {version: math.prod(each[:FITTED]) ** (1 / len(each[:FITTED])) for version, each in ratios.items()}
    seen: dict[tuple[str, str], int] = {}
    results = []
    for one, predicted in zip(found, seconds, strict=True):
        seen[one.version] = seen.get(one.version, 0) + 1
        others = median(value for name, value in typical.items() if name != one.source.name)
        results.append(Prediction(one, predicted, factors[one.version], others, seen[one.version] <= FITTED))
    return results


def quantiles(errors: Sequence[float]) -> tuple[float, float]:
    """(median, 90th percentile) of sizes."""
    sizes = sorted(map(abs, errors))
    return (median(sizes), sizes[min(len(sizes) - 1, math.ceil(0.9 * len(sizes)) - 1)]) if sizes else (0.0, 0.0)


def order(predictions: Sequence[Prediction]) -> tuple[float, int]:
    """(Kendall's tau, pairs) over pairs of rows that differ in layout only."""
    sweeps: dict[tuple[object, ...], list[Prediction]] = {}
    for each in predictions:
        row = each.case.row
        alike = ("source", "model", "layers", "hidden", "gpu", "gpus", "global_batch", "seq_len", "precision")
        key = tuple(row[name] for name in alike) + each.case.version
        sweeps.setdefault(key, []).append(each)
    agree = pairs = 0
    for sweep in sweeps.values():
        for one, two in combinations(sweep, 2):
            published, predicted = one.case.seconds / two.case.seconds, one.seconds / two.seconds
            same = one.case.layout == two.case.layout and one.case.config.train == two.case.config.train
            if abs(math.log(published)) < OUT_OF_SIGHT or (same and abs(math.log(predicted)) < 1e-9):
                continue
            pairs += 1
            agree += 1 if (published > 1) == (predicted > 1) else -1
    return (agree / pairs if pairs else math.nan), pairs


def by_source(predictions: Sequence[Prediction]) -> Mapping[str, list[Prediction]]:
    """In the order of the tables."""
    found: dict[str, list[Prediction]] = {}
    for each in predictions:
        found.setdefault(each.case.source.name, []).append(each)
    return found


def report(predictions: Sequence[Prediction]) -> str:
    """The table that is printed."""
    lines = [
        f"{'source':26s} {'rows':>5s}  {'as it is':>15s}  {'scaled':>15s}  {'others':>15s}  {'tau':>5s} {'pairs':>6s}"
    ]
    groups = [*by_source(predictions).items(), ("all rows", list(predictions))]
    for name, some in groups:
        cells = []
        for values in (
            [each.error for each in some],
            [each.scaled_error for each in some if not each.fitted],
            [each.others_error for each in some],
        ):
            middle, high = quantiles(values)
            cells.append(f"{middle:7.1%}{high:8.1%}" if values else f"{'':15s}")
        tau, pairs = order(some)
        lines.append(f"{name:26s} {len(some):5d}  {'  '.join(cells)}  {tau:5.2f} {pairs:6d}")
    sources = [
        [quantiles(values) for values in ([e.error for e in some], [e.scaled_error for e in some])]
        for _, some in groups[:-1]
    ]
    for place, what in enumerate(("as it is", "scaled")):
        lines.append(f"of all sources, {what}: median of medians {median(each[place][0] for each in sources):.1%}")
    return "\n".join(lines)


def write(path: Path, predictions: Sequence[Prediction]) -> None:
    """A line for each row."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "id",
                "source",
                "version",
                "model",
                "gpu",
                "gpus",
                "layout",
                "published_s",
                "predicted_s",
                "error",
                "factor",
                "scaled_error",
                "fitted",
            ]
        )
        for each in predictions:
            one = each.case
            writer.writerow(
                [
                    one.id,
                    one.source.name,
                    one.version[1],
                    one.row["model"],
                    one.row["gpu"],
                    one.row["gpus"],
                    one.layout.describe(),
                ]
                + [f"{value:.5g}" for value in (one.seconds, each.seconds, each.error, each.factor, each.scaled_error)]
                + [each.fitted]
            )


def scatter(path: Path, predictions: Sequence[Prediction]) -> None:
    """Predicted against published seconds, both by logarithms."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 8))
    for name, some in by_source(predictions).items():
        axes.loglog([e.case.seconds for e in some], [e.seconds for e in some], ".", ms=5, alpha=0.7, label=name)
    low, high = (pick(e.case.seconds for e in predictions) for pick in (min, max))
    for factor, style in ((1.0, "-"), (0.8, ":"), (1.25, ":")):
        axes.plot([low, high], [low * factor, high * factor], "k" + style, lw=0.8)
    axes.set(xlabel="published seconds of a step", ylabel="predicted seconds, nothing fitted to a source")
    axes.legend(fontsize=7, ncol=2)
    figure.savefig(path, bbox_inches="tight")


def main(argv: list[str] | None = None) -> int:
    """Print the errors by source; write table and picture."""
    parser = argparse.ArgumentParser(description="predicted step times against published ones")
    add_reference(parser)
    parser.add_argument("--out", type=Path, help="CSV file for all rows")
    parser.add_argument("--plot", type=Path, help="picture of predicted against published seconds")
    parser.add_argument("--simulate", action="store_true", help="by the schedules' lists instead of their formulas")
    parser.add_argument("--left-out", action="store_true", help="name the rows that are left out, and why")
    arguments = parser.parse_args(argv)
    if is_missing(arguments.reference / "layouts.csv"):
        return 2
    found, left = cases(arguments.reference)
    predictions = predict(found, arguments.simulate)
    print(report(predictions))
    print(f"{len(left)} rows are left out" + (":" if arguments.left_out else " (--left-out says which, and why)"))
    if arguments.left_out:
        print(*left, sep="\n")
    if arguments.out:
        write(arguments.out, predictions)
    if arguments.plot:
        scatter(arguments.plot, predictions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
