"""`megacore train`: trains a run file, as one of a job's ranks or by starting local processes.

Under torchrun or srun this process joins the others; else it starts ``--nproc`` processes on this machine (by default
as many as the layout needs).
"""

import argparse
import os
import sys

from megacore.config.load import load
from megacore.config.resolve import resolve, smallest_world
from megacore.config.schema import RunConfig
from megacore.config.validate import check
from megacore.data.run_tokenizer import fill_in
from megacore.launch.processes import run_local
from megacore.launch.terminal import colour_wanted, page_width
from megacore.launch.worker import call
from megacore.mesh.rank_info import RankInfo

TARGET = "megacore.train.loop:train"


def main(argv: list[str] | None = None) -> int:
    """Train; the exit code is that of `megacore`."""
    args = parser().parse_intermixed_args(argv)  # overrides may stand on both sides of options
    if args.run and "=" in args.run:  # only overrides were given
        args.overrides.insert(0, args.run)
        args.run = None
    if not args.run and not args.preset:
        raise ValueError("megacore train needs a run file or --preset NAME; `megacore presets` lists the presets")
    config = load(args.run, args.overrides, args.preset)
    info = RankInfo.from_environment(os.environ)
    if info is not None and args.nproc:
        raise ValueError(f"--nproc={args.nproc} starts processes, but this one is already rank {info.rank} of a job")
    world_size = info.world_size if info else args.nproc or smallest_world(config)
    config = complete(config, world_size)
    colour, width = colour_wanted(sys.stdout), page_width()
    if info is None:
        return run_local(TARGET, (config, colour, width), world_size)
    return call(TARGET, info, (config, colour, width))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="megacore train", description="Train a model from a run file or a preset.")
    parser.add_argument("run", nargs="?", metavar="RUN.toml", help="the run file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that win over the file's")
    parser.add_argument("--preset", metavar="NAME", help="start from a known model (see `megacore presets`)")
    parser.add_argument("--nproc", type=int, metavar="N", help="local processes; default: what the layout needs")
    return parser


def complete(config: RunConfig, world_size: int) -> RunConfig:
    """The run, checked and resolved, with what only the data can tell.

    Raises ValueError with everything that is wrong, before any process has started.
    """
    check(config, world_size)
    config = fill_in(config)
    check(config, world_size)  # the vocabulary is known now
    return resolve(config, world_size)


if __name__ == "__main__":
    from megacore.exits import run

    sys.exit(run("megacore.launch.train", sys.argv[1:]))
