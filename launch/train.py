"""`megacore train`: trains a run file, as one of a job's ranks or by starting local processes.

Under torchrun or srun this process joins the others; else it starts ``--nproc`` processes on this machine (by default
as many as the layout needs).
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megacore.config.load import load
from megacore.config.parse import show
from megacore.config.pipeline import is_own_schedule
from megacore.config.resolve import resolve, smallest_world
from megacore.config.schema import RunConfig
from megacore.config.validate import check
from megacore.exits import STOPPED, raised_by_us
from megacore.launch.endings import NODE, Endings
from megacore.launch.environment import capability_here, lines_of, prepare
from megacore.launch.failures import Failure, describe
from megacore.launch.folders import check_folders
from megacore.launch.processes import Asked, leaving_when_asked, run_local
from megacore.launch.restarts import MAX_RESTARTS, with_restarts
from megacore.launch.terminal import colour_wanted, page_width
from megacore.launch.worker import call, end_with_node
from megacore.mesh.rank_info import RankInfo
from megacore.monitor.packages import check_packages
from megacore.spec import ModelSpec
from megacore.spec.settings import settings_of
from megacore.train.failpoints import Failpoints

TARGET = "megacore.train.loop:train"
NO_DATA = "data.blend is empty: there is nothing to train on; give a data set's prefix, or a list of [weight, prefix]"


def main(argv: list[str] | None = None) -> int:
    """Train; the exit code is that of `megacore`."""
    args = parser().parse_intermixed_args(argv)  # overrides may stand on both sides of options
    info = RankInfo.from_environment(os.environ)
    if info is not None or args.dry_run:
        return begun(args, info)
    try:
        with leaving_when_asked():
            return begun(args, info)
    except Asked:
        sys.stderr.write("megacore: stopped while nothing was trained, as was asked; the same command goes on\n")
        return STOPPED


def begun(args: argparse.Namespace, info: RankInfo | None) -> int:
    """What the command line asks for; the exit code."""
    if (args.json or args.gpu) and not args.dry_run:
        given = "--json" if args.json else "--gpu"
        raise ValueError(f"{given} goes with --dry-run; a run writes its metrics to its folder")
    try:
        config, world_size = requested(args, info)
    except ValueError as error:
        if info is not None and info.local_rank and raised_by_us(error.__traceback__):
            return 2  # the ranks of a machine all find the same; its first one says it
        raise
    if args.dry_run:
        if info is None or info.rank == 0:
            from megacore.launch.dry_run import show  # brings torch

            print(show(config, world_size, args), end="")
        return 0
    check_packages(config)
    Failpoints.of(os.environ, 0)  # what is asked for wrongly is told now
    if info is None or info.rank == 0:
        check_folders(config)
    colour, width = colour_wanted(sys.stdout), page_width()
    remarks = lines_of(prepare(config, os.environ, capability_here()))  # before anything brings torch
    if info is None:
        limit = MAX_RESTARTS if args.max_restarts is None else args.max_restarts

        def attempt(config: RunConfig, tell: Callable[[Failure], None]) -> int:
            return run_local(TARGET, (config, colour, width, remarks), world_size, tell=tell, stopped=STOPPED)

        return with_restarts(config, attempt, limit)
    return as_rank(TARGET, info, (config, colour, width, remarks))


def requested(args: argparse.Namespace, info: RankInfo | None) -> tuple[RunConfig, int]:
    """The complete run that the command line asks for, and its number of ranks."""
    if args.run and "=" in args.run:  # only overrides were given
        args.overrides.insert(0, args.run)
        args.run = None
    if (
        not args.run
        and not args.preset
        and not any(word.startswith("checkpoint.init_from=") for word in args.overrides)
    ):
        raise ValueError(
            "megacore train needs a run file, --preset NAME (`megacore presets` lists them) or a model to begin with: "
            "checkpoint.init_from=FOLDER"
        )
    if args.nproc is not None and args.nproc < 1:
        raise ValueError(f"--nproc={args.nproc} must be at least 1; leave it out for as many as the layout needs")
    if info is not None and args.nproc is not None:
        raise ValueError(f"--nproc={args.nproc} starts processes, but this one is already rank {info.rank} of a job")
    if args.max_restarts is not None and (args.max_restarts < 0 or info is not None):
        rule = (
            "is for processes that this command starts; torchrun has --max-restarts" if info else "must not be below 0"
        )
        raise ValueError(f"--max-restarts={args.max_restarts} {rule}")
    config = load(args.run, args.overrides, args.preset)
    world_size = info.world_size if info else args.nproc or smallest_world(config)
    return complete(config, world_size, needs_data=not args.dry_run), world_size


def as_rank(target: str, info: RankInfo, args: tuple[Any, ...]) -> int:
    """Train as one rank of a job that others started. Who only lost a peer says so in a line: the cause stands out.

    A node's command (``megacore.launch.node``) is told the ending and shows one for all. Torchrun with restarts takes
    every code but 0 for a fault, and would start a run again that was asked to stop; so that it ends, it gets 0.
    """
    endings = Endings.of(os.environ)
    if endings is not None:
        end_with_node(int(os.environ[NODE]))
    try:
        code = call(target, info, args)
    except Exception as error:
        failure = Failure.of_exception(info.rank, error)
        tell_torchrun(error)
    else:
        if code == STOPPED and endings is not None:
            endings.stopped(info.rank)
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
        return 0 if code == STOPPED and restarts else code
    if endings is not None:
        endings.failed(failure)
    elif failure.is_follow_up:
        sys.stderr.write(f"megacore: rank {info.rank} of {info.world_size} ends because another one has\n")
    else:
        sys.stderr.write(describe(failure, info.world_size, page_width()) + "\n")
    return 2 if failure.is_user_error else 1


def tell_torchrun(error: Exception) -> None:
    """Leave the cause where torchrun looks for it, if it is there."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors.error_handler import ErrorHandler

        ErrorHandler().record_exception(error)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="megacore train", description="Train a model from a run file or a preset.")
    parser.add_argument("run", nargs="?", metavar="RUN.toml", help="the run file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that win over the file's")
    parser.add_argument("--preset", metavar="NAME", help="start from a known model (see `megacore presets`)")
    parser.add_argument("--nproc", type=int, metavar="N", help="local processes; default: what the layout needs")
    parser.add_argument(
        "--max-restarts",
        type=int,
        metavar="N",
        help="after a fault the processes start again from the newest checkpoint, at most so often without a newer "
        f"one; default {MAX_RESTARTS}",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the run, build ranks of it without numbers, print their memory and messages, start nothing; "
        "--nproc may be any number",
    )
    parser.add_argument("--gpu", metavar="NAME", help="with --dry-run: whose memory must suffice, such as h100")
    parser.add_argument("--json", action="store_true", help="with --dry-run: print JSON, in bytes")
    return parser


def complete(config: RunConfig, world_size: int, needs_data: bool = True) -> RunConfig:
    """The run, checked and resolved, with what only the data can tell; without ``needs_data`` a run that names none
    will do, if it knows its vocabulary.

    Raises ValueError with everything that is wrong, before any process has started.
    """
    # these bring numpy, which --help can do without
    from megacore.data.run_data import fill_in
    from megacore.train.schedule import num_microbatches, plan_schedule

    config = with_model(config)
    without = not needs_data and not config.data.blend and config.model.vocab_size > 0
    check(config, world_size, () if config.data.blend or without else (NO_DATA,))
    if not without:
        config = fill_in(config)
        check(config, world_size)  # the vocabulary is known now
    config = resolve(config, world_size)
    settings_of(ModelSpec.of(config.model).params, config.optim)  # patterns that match nothing are told now
    if is_own_schedule(config.parallel):
        plan_schedule(config, num_microbatches(config))
    return config


def with_model(config: RunConfig) -> RunConfig:
    """The run with the model of ``checkpoint.init_from``, where its [model] section gives no shape."""
    m, path = config.model, config.checkpoint.init_from
    if not path or m.num_layers or m.hidden_size or m.num_heads:
        return config
    from megacore.checkpoint.opening import open_weights

    try:
        model = open_weights(path).model
    except OSError as error:
        raise ValueError(
            f"checkpoint.init_from={show(path)} cannot be read ({error.strerror}); name a folder"
        ) from None
    taken = replace(model, dropout=m.dropout, attention_dropout=m.attention_dropout)
    return replace(config, model=taken)


if __name__ == "__main__":
    from megacore.exits import run

    sys.exit(run("megacore.launch.train", sys.argv[1:]))
