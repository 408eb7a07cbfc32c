"""`megacore plan`: finds the fastest layout that fits, or prices one: memory, bubble, communication, time, money.

Keys of a layout that are given (parallel.tp=8) are fixed, all others are searched; of a run file the model, the formats
and the batch count. Nothing is run, and no GPU is needed.

Ranked are layouts that the engine runs today; a faster one that needs what is not built is named in a note. --all
ranks it too, as does a model or a key that needs what is not built (experts, parallel.cp=2).
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from megacore.exits import of_users_files

if TYPE_CHECKING:
    from megacore.cost.economics import Bill, Failures
    from megacore.cost.estimate import Estimate
    from megacore.cost.machine import Machine
    from megacore.cost.outcome import Outcome
    from megacore.cost.planning import Wish

UNITS = MappingProxyType({"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12})


def main(argv: list[str] | None = None) -> int:
    """Plan and tell."""
    words = sys.argv[1:] if argv is None else argv
    args = parser().parse_intermixed_args(argv)
    if args.run and "=" in args.run:  # only overrides were given
        args.overrides.insert(0, args.run)
        args.run = None
    _check(args)
    from megacore.cost.machine import find_machine, machine_names

    if args.gpu == "list":
        _list_machines([find_machine(name) for name in machine_names()], args.json)
        return 0
    from megacore.cost.planning import read_wish

    machine = find_machine(args.gpu)
    asked = (args.run, args.preset, args.overrides, args.gpus, machine, args.global_batch, args.headroom, args.all)
    wish = read_wish(*asked)
    if args.estimate:
        return _estimate(wish, args)
    return _plan(wish, args, "megacore plan " + shlex.join(words))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    about = (__doc__ or "").partition(": ")[2]
    parser = argparse.ArgumentParser(
        prog="megacore plan", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", metavar="RUN.toml", help="a run file; or --preset, or model.* keys alone")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any key of a run file")
    parser.add_argument("--preset", metavar="NAME", help="a known model (`megacore presets` lists them)")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="devices in all (8)")
    parser.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME|FILE.toml",
        help="the machine (h100): a name, a file of one's own; or: list",
    )
    parser.add_argument("--top", type=int, default=5, metavar="N", help="how many layouts to list (5)")
    parser.add_argument("--all", action="store_true", help="rank layouts too that the engine does not run yet")
    parser.add_argument("--estimate", action="store_true", help="price exactly the layout that is given")
    parser.add_argument("--global-batch", type=int, default=0, metavar="N", help="samples of a step (the run's)")
    parser.add_argument("--headroom", type=float, default=0.1, metavar="X", help="share of memory left free (0.1)")
    parser.add_argument(
        "--tokens", type=_number, metavar="N", help="of the whole run, such as 15T: time and money for it"
    )
    parser.add_argument("--price", type=float, metavar="X", help="dollars per GPU-hour (the machine's)")
    parser.add_argument("--deadline", type=float, metavar="DAYS", help="with --tokens: how many GPUs that takes")
    parser.add_argument(
        "--mtbf-hours", type=float, default=0.0, metavar="X", help="between failures of one GPU (45,600)"
    )
    parser.add_argument(
        "--save-seconds", type=float, default=0.0, metavar="X", help="that a checkpoint stalls (estimated)"
    )
    parser.add_argument("--restart-seconds", type=float, default=0.0, metavar="X", help="from failure to step (600)")
    parser.add_argument("--html", metavar="OUT.html", help="write the plan as one page with pictures")
    parser.add_argument("--plot", metavar="FOLDER", help="write the pictures as .svg files")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _number(text: str) -> float:
    try:
        unit = UNITS.get(text[-1:].lower(), 0.0)
        return float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; write 2e12, 300B or 15T") from None


def _check(args: argparse.Namespace) -> None:
    """What can be said before anything is computed. Raises ValueError."""
    if args.gpu == "list":
        return
    if not args.run and not args.preset and not args.overrides:
        raise ValueError(
            "megacore plan needs a run file, --preset NAME or model.* keys, as in: "
            "megacore plan --preset llama3-8b --gpus 64 --gpu h100; `megacore presets` lists the presets"
        )
    if args.top < 1:
        raise ValueError(f"--top={args.top} must be at least 1")
    if args.price is not None and not 0 <= args.price < float("inf"):
        raise ValueError(f"--price={args.price:g} must be at least 0 dollars per GPU-hour")
    if args.deadline is not None and args.tokens is None:
        raise ValueError(
            f"--deadline={args.deadline:g} needs --tokens, such as --tokens 2T: what is to be done by then"
        )
    for name, suffix in (("html", ".html"),):
        path = getattr(args, name)
        if path and (not path.endswith(suffix) or not Path(path).absolute().parent.is_dir()):
            raise ValueError(f"--{name}={path} cannot be written; name a {suffix} file in a folder that exists")
    if args.plot and Path(args.plot).exists() and not Path(args.plot).is_dir():
        raise ValueError(f"--plot={args.plot} is a file; name a folder")
    if args.estimate and args.deadline is not None:
        raise ValueError("--deadline searches layouts; leave --estimate out")


def _estimate(wish: "Wish", args: argparse.Namespace) -> int:
    """Exactly one layout."""
    found = wish.estimate()
    lasting, paid = _money(found, wish.machine, args)
    if args.json:
        print(json.dumps(found.as_json() | _money_json(lasting, paid), indent=1))
        return 0
    from megacore.cost.screen import screen_of_one

    print("\n".join(screen_of_one(found, wish.machine, lasting, paid, _paint(), _width())))
    return 0


def _plan(wish: "Wish", args: argparse.Namespace, command: str) -> int:
    """The search and all that is said of it."""
    from megacore.cost.outcome import judge

    outcome = judge(wish, args.top)
    if not outcome.best:
        if args.json:
            print("[]")
        raise ValueError(outcome.nothing())
    lasting, paid = _money(outcome.best[0], wish.machine, args)
    deadline = _deadline(wish, args) if args.deadline is not None else ""
    if args.json:
        listed = [each.as_json() for each in outcome.best]
        listed[0] |= outcome.as_json() | _money_json(lasting, paid) | ({"deadline": deadline} if deadline else {})
        print(json.dumps(listed, indent=1))
    else:
        from megacore.cost.screen import screen

        print("\n".join(screen(outcome, lasting, paid, deadline, _paint(), _width())))
    if args.html or args.plot:
        with of_users_files(" ".join(f"--{name}={value}" for name, value in _pictures(args)) + " cannot be written"):
            _draw(outcome, args, command, lasting, paid, deadline)
    return 0


def _pictures(args: argparse.Namespace) -> list[tuple[str, str]]:
    return [(name, getattr(args, name)) for name in ("html", "plot") if getattr(args, name)]


def _draw(
    outcome: "Outcome",
    args: argparse.Namespace,
    command: str,
    lasting: "Failures",
    paid: "Bill | None",
    deadline: str,
) -> None:
    from megacore.cost.pictures import pictures

    figures = pictures(outcome)
    if args.plot:
        folder = Path(args.plot)
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            (folder / f"{name}.svg").write_text(figure.svg, encoding="utf-8")
            print(f"wrote {folder / f'{name}.svg'}", file=sys.stderr)
    if args.html:
        from megacore.cost.page import Report, page
        from megacore.cost.planning import run_lines

        model = args.preset or (Path(args.run).stem if args.run else "a model")
        report = Report(
            title=f"{model} on {outcome.wish.world:,} x {outcome.wish.machine.name}",
            command=command,
            best=outcome.best,
            verdicts=outcome.verdicts,
            runner_up=outcome.runner_up,
            figures=tuple(figures.values()),
            lines=run_lines(outcome.best[0]),
            lasting=lasting,
            price=_price(outcome.wish.machine, args),
            bill=paid,
            deadline=deadline,
        )
        Path(args.html).write_text(page(report), encoding="utf-8")
        print(f"wrote {args.html}", file=sys.stderr)


def _price(machine: "Machine", args: argparse.Namespace) -> float:
    return machine.price_per_gpu_hour if args.price is None else args.price


def _money(found: "Estimate", machine: "Machine", args: argparse.Namespace) -> "tuple[Failures, Bill | None]":
    from megacore.cost.economics import bill, failures

    lasting = failures(found, args.mtbf_hours, args.save_seconds, args.restart_seconds)
    return lasting, None if args.tokens is None else bill(found, args.tokens, _price(machine, args), lasting)


def _money_json(lasting: "Failures", paid: "Bill | None") -> dict[str, object]:
    from megacore.cost.economics import as_json

    return {"failures": as_json(lasting)} | ({"bill": as_json(paid)} if paid else {})


def _deadline(wish: "Wish", args: argparse.Namespace) -> str:
    """How many devices are done in time, in whole nodes."""
    from dataclasses import replace
    from math import inf

    from megacore.cost.economics import gpus_for
    from megacore.cost.search import Search

    def days_of(world: int) -> float:
        space = replace(wish, world=world).space()
        found = Search(space, wish.machine, wish.practice, wish.headroom).run(1, simulate=False)
        paid = _money(found.best[0], wish.machine, args)[1] if found.best else None
        return paid.days if paid else inf

    node = wish.machine.gpus_per_node
    fewest, tried = gpus_for(args.deadline, args.tokens, node, 1 << 16, days_of)
    if not fewest:
        nearest = min(tried, key=lambda number: tried[number])
        return (
            f"no number of GPUs up to {1 << 16:,} is done in {args.deadline:g} days; the fastest plan that was tried, "
            f"{nearest:,} GPUs, takes {tried[nearest]:,.1f}"
        )
    return f"done in {args.deadline:g} days with {fewest:,} GPUs, whose best plan takes {tried[fewest]:,.1f} days"


def _list_machines(machines: "list[Machine]", as_json: bool) -> None:
    from megacore.cost.screen import machine_rows, table

    if as_json:
        print(json.dumps([dict(zip(machine_rows([])[0], row)) for row in machine_rows(machines)[1:]], indent=1))
    else:
        print("\n".join(table(machine_rows(machines))))


def _paint():  # type: ignore[no-untyped-def]
    from megacore.launch.terminal import colour_wanted
    from megacore.monitor.console import colourful, plain

    return colourful if colour_wanted(sys.stdout) else plain


def _width() -> int:
    from megacore.launch.terminal import page_width

    return page_width()


if __name__ == "__main__":
    from megacore.exits import run

    sys.exit(run("megacore.tools.plan", sys.argv[1:]))
