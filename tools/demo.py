"""`megacore demo`: from real text to a trained language model on this machine, in a few minutes.

Text found on any machine with Python (or your own) becomes a tokenizer, a dataset and a small Llama-like model, trained
with tensor and pipeline parallelism on four local processes. A second call uses again what is there and unchanged.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from megacore.config.load import load


def main(argv: list[str] | None = None) -> int:
    """The tour; returns the exit code."""
    arguments = parser().parse_args(argv)
    if arguments.steps is not None and arguments.steps < 1:
        raise ValueError(f"--steps {arguments.steps} must be at least 1; the usual number is {usual_steps()}")
    for path in map(Path, arguments.text):
        if not path.expanduser().exists():
            raise ValueError(f"--text {path}: there is no such file or folder; give text files or folders of them")
    # numpy and the tokenizer libraries are loaded only now, so that --help answers at once.
    from megacore.demo.tour import run_tour
    from megacore.demo.training import Launcher
    from megacore.demo.workshop import Options
    from megacore.launch.terminal import colour_wanted, page_width
    from megacore.monitor.console import Console

    console = Console(sys.stdout, colour=colour_wanted(sys.stdout), width=page_width())
    try:
        return run_tour(Options(**vars(arguments)), console, Launcher(train, command()))
    finally:
        console.close()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="megacore demo", description=__doc__.partition(": ")[2])
    parser.add_argument("--text", nargs="+", default=[], metavar="PATH", help="your own files or folders to learn from")
    parser.add_argument("--steps", type=int, metavar="N", help=f"training steps (default {usual_steps()})")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder (default runs/demo)")
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="tokens in the vocabulary (default: by corpus size)"
    )
    parser.add_argument("--fast", action="store_true", help="less text and few steps, to see that everything works")
    parser.add_argument("--fresh", action="store_true", help="make everything anew (an earlier run is kept aside)")
    return parser


def usual_steps() -> int:
    """How long the tour trains unless told otherwise."""
    return load(None, preset="demo").train.steps


def train(argv: list[str]) -> int:
    """`megacore train`."""
    from megacore.launch.train import main  # it brings torch

    return main(argv)


def command() -> str:
    """How the user can call megacore from here."""
    if shutil.which("megacore"):
        return "megacore"
    beside = Path(sys.executable).parent / "megacore"  # a virtual environment that is not activated
    if beside.exists():
        return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
    return f"{sys.executable} -m megacore"


if __name__ == "__main__":
    from megacore.exits import run

    sys.exit(run("megacore.tools.demo", sys.argv[1:]))
