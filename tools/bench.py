"""`megacore bench`: measures, always as a ratio to another implementation in the same run."""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megacore.bench.harness import Comparison

MEASURE_TRAIN = "megacore.bench.train:measure"


def main(argv: list[str] | None = None) -> int:
    """Run one group of benchmarks and show it; --output keeps it."""
    arguments = parser().parse_args(argv)
    if arguments.rounds < 1:
        raise ValueError(f"--rounds={arguments.rounds} must be at least 1")
    from megacore.bench import report

    machine = report.machine()
    comparisons = arguments.measure(arguments)
    if arguments.output:
        report.write(Path(arguments.output), arguments.benchmark, comparisons, machine)
    if arguments.json:
        print(json.dumps({"machine": machine, "comparisons": [report.as_dict(one) for one in comparisons]}, indent=1))
    else:
        print(report.table(comparisons))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="megacore bench", description=__doc__.partition(": ")[2])
    groups = parser.add_subparsers(dest="benchmark", required=True, metavar="{data,train}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON instead of a table")
    common.add_argument("--output", metavar="FOLDER", help="also write JSON and CSV there")
    data = groups.add_parser(
        "data", parents=[common], help="building sample indices against megatron-core, tokenising against libraries"
    )
    data.add_argument("--case", default="", metavar="WORDS", help="only those whose name contains this")
    data.add_argument("--rounds", type=int, default=7, help="timed runs of each side (default 7)")
    data.set_defaults(measure=measure_data)
    step = groups.add_parser("train", parents=[common], help="a training step: one process, tp=2, dp=2")
    step.add_argument("overrides", nargs="*", metavar="key=value", help="model.*, train.* and optim.* keys of a run")
    step.add_argument("--case", action="append", metavar="NAME", help="only this case; may be given again")
    step.add_argument("--rounds", type=int, default=30, help="timed steps of each side (default 30)")
    step.set_defaults(measure=measure_train)
    return parser


def measure_data(arguments: argparse.Namespace) -> list["Comparison"]:
    """Indices and tokenising; a benchmark whose other side is not installed is left out, and that is said."""
    from megacore.bench.data import benchmarks

    chosen = benchmarks(arguments.case)
    runnable = [one for one in chosen if one.runnable]
    packages = sorted({one.package for one in chosen if not one.runnable})
    if not runnable:
        raise ValueError(f"nothing to compare with: {', '.join(packages)} not installed; pip install them first")
    if packages:
        sys.stderr.write(f"left out: what compares with {', '.join(packages)}, not installed here\n")
    comparisons = []
    for one in runnable:
        sys.stderr.write(f"{one.name} ...\n")
        comparisons.append(one.measure(arguments.rounds))
    return comparisons


def measure_train(arguments: argparse.Namespace) -> list["Comparison"]:
    """Training steps: each case on fresh processes."""
    from megacore.bench.train import CASES, case_named, collect, configure
    from megacore.launch.processes import run_local

    config = configure(arguments.overrides)
    comparisons = []
    for case in [case_named(name) for name in arguments.case] if arguments.case else CASES:
        sys.stderr.write(f"{case.name} ...\n")
        with tempfile.TemporaryDirectory(prefix="megacore-bench-") as folder:
            result = Path(folder) / "seconds.json"
            code = run_local(MEASURE_TRAIN, (case.name, config, arguments.rounds, str(result)), case.nproc)
            if code:  # the cause has been told
                raise SystemExit(code)
            comparisons.append(collect(case, config, result))
    return comparisons


if __name__ == "__main__":
    from megacore.exits import run

    sys.exit(run("megacore.tools.bench", sys.argv[1:]))
