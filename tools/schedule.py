"""`megacore schedule`: generates, proves, simulates and draws a pipeline schedule, or one of your own from a file."""

import argparse
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacore.exits import of_users_files

if TYPE_CHECKING:
    from megacore.cost.simulate import Durations
    from megacore.cost.timeline import Timeline
    from megacore.schedule.schedule import Schedule

TIMES = (
    ("forward", "a forward of one chunk (default 1)"),
    ("backward", "a backward of one chunk (2)"),
    ("input-grad", "the half of it that makes the gradient of its input (1)"),
    ("weight-grad", "the half that makes those of its weights (1)"),
)
# What the library calls the settings of a run goes here by other names.
HERE = (
    ("parallel.pp", "--stages"),
    ("parallel.chunks", "--chunks"),
    ("parallel.schedule", "KIND"),
    ("num_microbatches", "--microbatches"),
)
SUFFIXES = (".svg", ".png")


def main(argv: list[str] | None = None) -> int:
    """Print what was asked for; without such a wish, a picture and the figures. Nothing is printed of a wrong list."""
    arguments = parser().parse_args(argv)
    _check(arguments)
    # numpy is loaded only now, so that --help answers at once.
    from megacore.cost.simulate import simulate
    from megacore.cost.trace import read_timeline, write_trace
    from megacore.schedule.text import to_text

    measured = read_timeline(Path(arguments.measured)) if arguments.measured else None
    schedule = _schedule(arguments, measured)
    whole = _proven(schedule, arguments)
    durations = _durations(arguments, measured)
    predicted = simulate(schedule, durations)

    if arguments.plot:
        from megacore.cost.plot.picture import save_picture

        with of_users_files(f"--plot={arguments.plot} cannot be written"):
            save_picture(Path(arguments.plot), predicted, measured)
    if arguments.trace:
        write_trace(Path(arguments.trace), simulate(whole, durations), measured)
    if arguments.json:
        print(json.dumps(_facts(predicted, whole if arguments.text else None, measured)))
    elif arguments.text:
        print(to_text(whole), end="")
    else:
        if not (arguments.plot or arguments.trace):
            print("\n".join(_pictures(predicted, measured)))
        print("\n".join(_summary(predicted, whole, measured)))
    for path in filter(None, (arguments.plot, arguments.trace)):
        print(f"wrote {path}", file=sys.stderr)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="megacore schedule", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument(
        "what",
        nargs="?",
        metavar="KIND|FILE.txt",
        help="gpipe, 1f1b, interleaved, zb-h1, zb-h2, zb-v, dualpipe-v or forward (evaluation); or a file with a line "
        '"RANK: INSTRUCTION ..." for each rank, such as --text prints; default: what the --measured run did',
    )
    parser.add_argument("--stages", type=int, metavar="P", help="pipeline ranks (a file says so itself)")
    parser.add_argument("--microbatches", type=int, metavar="M", help="of one step (a file says so itself)")
    parser.add_argument("--chunks", type=int, metavar="V", help="stages on each rank (default: the kind's own number)")
    parser.add_argument("--tied", action="store_true", help="the first and the last stage share their matrix")
    for name, what in TIMES:
        parser.add_argument(f"--{name}", type=_times, metavar="X", help=f"time of {what}; or X,X,...: of each stage")
    parser.add_argument(
        "--p2p", type=_times, metavar="X", help="time that a message travels (0); ranks compute meanwhile"
    )
    parser.add_argument("--max-live", type=float, metavar="N", help="refuse more microbatches' activations on a rank")
    parser.add_argument("--text", action="store_true", help="print the lists with messages, sums and steps, as a file")
    parser.add_argument("--json", action="store_true", help="print the lists and figures as JSON")
    parser.add_argument("--plot", metavar="OUT.svg", help="draw it, as .svg or .png")
    parser.add_argument("--trace", metavar="OUT.json", help="write a trace for Perfetto or chrome://tracing")
    parser.add_argument(
        "--measured",
        metavar="RUN/timeline.json",
        help="show a run beside its prediction, made with the run's own times",
    )
    return parser


def _times(text: str) -> float | tuple[float, ...]:
    try:
        times = tuple(map(float, text.split(",")))
    except ValueError:
        times = (-1.0,)
    if not all(0 <= time < float("inf") for time in times):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time: give a number of 0 or more, or one for each stage: 1,1.5,1"
        )
    return times if len(times) > 1 else times[0]


def _check(arguments: argparse.Namespace) -> None:
    """What can be said before anything is computed. Raises ValueError."""
    for name in ("stages", "microbatches", "chunks"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")
    if arguments.max_live is not None and not arguments.max_live > 0:
        raise ValueError(f"--max-live={arguments.max_live} must be more than 0")
    if not (arguments.what or arguments.measured):
        raise ValueError("what schedule? Name a kind (such as 1f1b) or a file, or give --measured RUN/timeline.json")
    for name in ("plot", "trace"):
        path = Path(getattr(arguments, name) or "out.svg")
        if name == "plot" and path.suffix not in SUFFIXES:
            raise ValueError(f"--plot={path}: its name says what to draw; end it in {' or '.join(SUFFIXES)}")
        if not path.parent.is_dir() or path.is_dir():
            raise ValueError(f"--{name}={path} cannot be written; name a file in a folder that exists")


def _schedule(arguments: argparse.Namespace, measured: "Timeline | None") -> "Schedule":
    """The lists asked for, as they are given. Raises ValueError."""
    from megacore.config.errors import did_you_mean
    from megacore.schedule.generators.generate import KINDS, generate

    what = arguments.what
    if what not in KINDS:
        if what is None and measured is not None:
            found = measured.schedule
        elif what.endswith(".txt") or Path(what).is_file():
            found = _read(Path(what))
        else:
            raise ValueError(f"{what!r} is neither a kind nor a file.txt; {did_you_mean(what, KINDS)}")
        for name, given, own in (
            ("stages", arguments.stages, found.num_ranks),
            ("microbatches", arguments.microbatches, found.num_microbatches),
            ("chunks", arguments.chunks, _chunks(found)),
        ):
            if given not in (None, own):
                raise ValueError(
                    f"--{name}={given} does not agree with {what or arguments.measured}: {own}; leave it out"
                )
        return found
    for name in ("stages", "microbatches"):
        if getattr(arguments, name) is None:
            raise ValueError(
                f"--{name} is missing; {what} needs it, as in: megacore schedule {what} --stages 4 --microbatches 8"
            )
    try:
        return generate(what, arguments.stages, arguments.microbatches, arguments.chunks or 0)
    except ValueError as error:
        said = str(error)
    for theirs, ours in HERE:
        said = said.replace(theirs, ours)
    raise ValueError(said)


def _read(path: Path) -> "Schedule":
    from megacore.schedule.text import from_text

    try:
        return from_text(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; give a file of lists or a kind") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _proven(schedule: "Schedule", arguments: argparse.Namespace) -> "Schedule":
    """The whole lists, with messages, sums and steps. Raises ValueError where they break a rule."""
    from megacore.schedule.check import check
    from megacore.schedule.lower import lower

    max_live = None if arguments.max_live is None else [arguments.max_live] * schedule.num_ranks
    whole = lower(schedule, arguments.tied)
    if whole is schedule and arguments.tied:
        raise ValueError(
            "--tied adds to lists that only compute; these have messages already: write T there, or leave it out"
        )
    try:
        return check(whole, max_live)
    except ValueError as error:
        added = "" if whole is schedule else " (positions count the messages that were added, too)"
        source = f"{arguments.what}: " if arguments.what and arguments.what != schedule.kind else ""
        raise ValueError(f"{source}{error}{added}".replace("max_live", "--max-live")) from None


def _chunks(schedule: "Schedule") -> int:
    """Stages on the rank that has most."""
    return max(Counter(schedule.home).values(), default=0)


def _durations(arguments: argparse.Namespace, measured: "Timeline | None") -> "Durations":
    from megacore.cost.simulate import Durations

    names = ("forward", "backward", "input_grad", "weight_grad", "p2p")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return replace(Durations() if measured is None else Durations.measured(measured), **given)


def _facts(timeline: "Timeline", whole: "Schedule | None", measured: "Timeline | None") -> dict[str, Any]:
    from megacore.schedule.instruction import COMPUTE
    from megacore.schedule.live import peak_activations
    from megacore.schedule.words import words

    schedule = timeline.schedule
    facts: dict[str, Any] = {
        "kind": schedule.kind,
        "stages": schedule.num_ranks,
        "chunks": _chunks(schedule),
        "microbatches": schedule.num_microbatches,
        "ranks": [words(rank.having(*COMPUTE)) for rank in schedule.ranks],
        "bubble_fraction": timeline.bubble_fraction,
        "peak_activations": peak_activations(schedule),
        "rank_idle": timeline.rank_idle,
        "checked": True,
    }
    if whole:
        facts["instructions"] = [words(rank) for rank in whole.ranks]
    if measured:
        facts["measured"] = {"bubble_fraction": measured.bubble_fraction, "rank_idle": measured.rank_idle}
    return facts


def _pictures(*timelines: "Timeline | None") -> list[str]:
    from megacore.cost.plot.terminal import terminal_picture
    from megacore.launch.terminal import colour_wanted, page_width
    from megacore.monitor.console import colourful

    paint = colourful if colour_wanted(sys.stdout) else None
    return [line for each in timelines if each for line in (*terminal_picture(each, page_width(), paint), "")]


def _summary(predicted: "Timeline", whole: "Schedule", measured: "Timeline | None") -> list[str]:
    from megacore.schedule.instruction import COMPUTE
    from megacore.schedule.live import peak_activations

    peaks = peak_activations(predicted.schedule)
    num_computing = sum(len(rank.having(*COMPUTE)) for rank in whole.ranks)
    num_all = sum(map(len, whole.ranks))
    lines = [
        f"instructions   {num_all:,} checked, of which {num_computing:,} compute",
        f"activations    at most {max(peaks):g} microbatches' on a rank; {peaks[0]:g} on the first",
    ]
    for name, each in (("simulated", predicted), ("measured", measured)):
        if each is not None:
            idle = max(each.rank_idle)
            lines.append(
                f"{name:<14} {each.makespan:g} long; bubble {each.bubble_fraction:.2%}; "
                f"most idle between its own first and last work: rank {each.rank_idle.index(idle)}, {idle:g}"
            )
    return lines


if __name__ == "__main__":
    from megacore.exits import run

    sys.exit(run("megacore.tools.schedule", sys.argv[1:]))
