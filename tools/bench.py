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
    from megacore.bench import report

    machine = report.machine()
    comparisons = train(arguments)
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
    groups = parser.add_subparsers(dest="benchmark", required=True, metavar="{train}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON instead of a table")
    common.add_argument("--output", metavar="FOLDER", help="also write JSON and CSV there")
    step = groups.add_parser("train", parents=[common], help="a training step: one process, tp=2, dp=2")
    step.add_argument("overrides", nargs="*", metavar="key=value", help="model.*, train.* and optim.* keys of a run")
    step.add_argument("--case", action="append", help="only this case; may be given again")
    step.add_argument("--rounds", type=int, default=30, help="timed steps of each side (default 30)")
    return parser


def train(arguments: argparse.Namespace) -> list["Comparison"]:
    """Training steps: each case on fresh processes."""
    from megacore.bench.train import CASES, case_named, collect, configure
    from megacore.launch.processes import run_local

    if arguments.rounds < 1:
        raise ValueError(f"--rounds={arguments.rounds} must be at least 1")
    config = configure(arguments.overrides)
    comparisons = []
    for case in [case_named(name) for name in arguments.case] if arguments.case else CASES:
        sys.stderr.write(f"{case.name} ...\n")
        with tempfile.TemporaryDirectory(prefix="megacore-bench-") as folder:
            result = Path(folder) / "seconds.json"
            code = run_local(MEASURE_TRAIN, (case.name, config, arguments.rounds, str(result)), case.nproc)
            if code:
                raise RuntimeError(f"the benchmark {case.name} ended with exit code {code}")
            comparisons.append(collect(case, config, result))
    return comparisons


if __name__ == "__main__":
    from megacore.exits import run

    sys.exit(run("megacore.tools.bench", sys.argv[1:]))
