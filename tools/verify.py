"""`megacore verify`: proves that layouts of a run compute what one process computes.

One step in float64: every gradient, every updated weight, the loss and the gradient norm, in one process and in each
layout. Exit code 0: all agree; 1: some do not.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacore.config.load import load
from megacore.launch.processes import run_local
from megacore.launch.terminal import colour_wanted, page_width

if TYPE_CHECKING:
    from megacore.verify.outcome import Outcome
    from megacore.verify.plan import Plan

TARGET = "megacore.verify.ranks:work"


def main(argv: list[str] | None = None) -> int:
    """Verify and tell; the exit code is that of `megacore`."""
    args = parser().parse_intermixed_args(argv)
    if args.run and "=" in args.run:  # only overrides were given
        args.overrides.insert(0, args.run)
        args.run = None
    if not args.run and not args.preset and not args.overrides:
        raise ValueError("megacore verify needs a run file or --preset NAME; `megacore presets` lists the presets")
    run = load(args.run, args.overrides, args.preset)
    from megacore.monitor.console import Console
    from megacore.verify import outcome
    from megacore.verify.plan import make_plan
    from megacore.verify.screen import Table, head, name_of, verdict

    plan = make_plan(run, args.layouts, args.max_ranks, args.shrink, args.as_run)
    table = Table.of(plan, colour_wanted(sys.stdout))
    if not args.json:
        console = Console(sys.stdout, colour=table.colour, width=page_width())
        console.box("megacore verify", head(plan, name_of(args.run, args.preset), page_width() - 4))
        console.line(table.header())
    with tempfile.TemporaryDirectory(prefix="megacore-verify-") as folder:
        code = 1
        try:
            code = run_local(TARGET, (plan, folder, None if args.json else table), plan.num_ranks, sys.stderr.write)
        finally:
            if code:  # the cause has been told, or (where one process is all) is on its way up
                sys.stderr.write(where(plan, folder))
        if code:
            return code
        outcomes = outcome.read(Path(folder))
    if args.json:
        print(json.dumps(as_json(plan, outcomes), indent=1))
    else:
        print("\n" + verdict(outcomes, table.paint))
    return 0 if all(one.agrees for one in outcomes) else 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="megacore verify", description="Prove that layouts of a run compute what one process computes."
    )
    parser.add_argument("run", nargs="?", metavar="RUN.toml", help="the run file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that win over the file's")
    parser.add_argument("--preset", metavar="NAME", help="start from a known model (see `megacore presets`)")
    parser.add_argument(
        "--layouts",
        metavar="LIST",
        help='such as "tp=2,pp=2;dp=2;pp=4,chunks=2,schedule=interleaved": keys of [parallel]; a size that is not '
        "named is 1; default: a choice of all legal layouts",
    )
    parser.add_argument("--max-ranks", type=int, default=8, metavar="N", help="processes at most (default 8)")
    parser.add_argument(
        "--shrink",
        action=argparse.BooleanOptionalAction,
        help="compute a tiny twin of the model: same features, same remainders (default: where it is too large)",
    )
    parser.add_argument(
        "--as-run",
        action="store_true",
        help="keep the run's dtype and kernels; a layout may be twice as far from float64 as one process is",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def where(plan: "Plan", folder: str) -> str:
    """In which layout the ranks have ended before their time."""
    turns = [int(sign.name.partition("-")[2]) for sign in Path(folder).glob("turn-*")]
    if not turns:
        return ""
    text, place = plan.computed[max(turns)].text, f"{max(turns) + 1} of {len(plan.computed)}"
    return f'megacore: it was in layout {text} ({place}); --layouts "{text}" runs it alone\n'


def as_json(plan: "Plan", outcomes: list["Outcome"]) -> dict[str, Any]:
    """Everything that the screen shows."""
    return {
        "agree": all(one.agrees for one in outcomes),
        "twin": plan.twin or None,
        "data": plan.data,
        "dtype": plan.dtype,
        "microbatches": plan.num_microbatches,
        "left_out": max(0, plan.num_legal - len(plan.trials)),
        "layouts": [one.to_json() for one in outcomes],
    }


if __name__ == "__main__":
    from megacore.exits import run

    sys.exit(run("megacore.tools.verify", sys.argv[1:]))
