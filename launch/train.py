"""`megacore train`: trains a run file, as one of a job's ranks or by starting local processes.

Under torchrun or srun this process joins the others; else it starts ``--nproc`` processes on this machine (by default
as many as the layout needs).
"""

import argparse
import os
import sys
from dataclasses import replace
from typing import Any

from megacore.config.load import load
from megacore.config.pipeline import is_own_schedule
from megacore.config.resolve import resolve, smallest_world
from megacore.config.schema import RunConfig
from megacore.config.validate import check
from megacore.config.write import to_toml
from megacore.data.sampler import BatchPlan
from megacore.exits import raised_by_us
from megacore.launch.failures import Failure, describe
from megacore.launch.processes import run_local
from megacore.launch.terminal import colour_wanted, page_width
from megacore.launch.worker import call
from megacore.layout.layout import Layout
from megacore.mesh.rank_info import RankInfo
from megacore.spec import ModelSpec
from megacore.spec.settings import settings_of

TARGET = "megacore.train.loop:train"


def main(argv: list[str] | None = None) -> int:
    """Train; the exit code is that of `megacore`."""
    args = parser().parse_intermixed_args(argv)  # overrides may stand on both sides of options
    info = RankInfo.from_environment(os.environ)
    try:
        config, world_size = requested(args, info)
    except ValueError as error:
        if info is not None and info.local_rank and raised_by_us(error.__traceback__):
            return 2  # the ranks of a machine all find the same; its first one says it
        raise
    if args.dry_run:
        if info is None or info.rank == 0:
            print(preview(config, world_size), end="")
        return 0
    colour, width = colour_wanted(sys.stdout), page_width()
    if info is None:
        return run_local(TARGET, (config, colour, width), world_size)
    return as_rank(TARGET, info, (config, colour, width))


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
    config = load(args.run, args.overrides, args.preset)
    world_size = info.world_size if info else args.nproc or smallest_world(config)
    return complete(config, world_size), world_size


def preview(config: RunConfig, world_size: int) -> str:
    """What `--dry-run` prints: the overview as comments, then the resolved run, which together are a run file."""
    from megacore.data.source import open_sources
    from megacore.train.overview import overview, summary

    t = config.train
    sources = open_sources(config.data, "train", config.model.vocab_size)
    num_samples = BatchPlan(t.global_batch_size, t.micro_batch_size, t.batch_ramp).num_samples(t.steps)
    layout = Layout.of(config.parallel, world_size)
    data = summary(sources, num_samples, t.seq_len)
    lines = overview(config, ModelSpec.of(config.model), layout, t.device, data)
    return "".join(f"# {line}\n" for line in lines) + "\n" + to_toml(config)


def as_rank(target: str, info: RankInfo, args: tuple[Any, ...]) -> int:
    """Train as one rank of a job that others started. Who only lost a peer says so in a line: the cause stands out."""
    try:
        return call(target, info, args)
    except Exception as error:
        failure = Failure.of_exception(info.rank, error)
    if failure.is_follow_up:
        sys.stderr.write(f"megacore: rank {info.rank} of {info.world_size} ends because another one has\n")
    else:
        sys.stderr.write(describe(failure, info.world_size, page_width()) + "\n")
    return 2 if failure.is_user_error else 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="megacore train", description="Train a model from a run file or a preset.")
    parser.add_argument("run", nargs="?", metavar="RUN.toml", help="the run file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that win over the file's")
    parser.add_argument("--preset", metavar="NAME", help="start from a known model (see `megacore presets`)")
    parser.add_argument("--nproc", type=int, metavar="N", help="local processes; default: what the layout needs")
    parser.add_argument("--dry-run", action="store_true", help="check the run, print what it would do, start nothing")
    return parser


def complete(config: RunConfig, world_size: int) -> RunConfig:
    """The run, checked and resolved, with what only the data can tell.

    Raises ValueError with everything that is wrong, before any process has started.
    """
    # these bring numpy, which --help can do without
    from megacore.data.run_data import fill_in
    from megacore.train.schedule import num_microbatches, plan_schedule

    config = with_model(config)
    blend = "data.blend is empty: there is nothing to train on; give a data set's prefix, or a list of [weight, prefix]"
    check(config, world_size, () if config.data.blend else (blend,))
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

    taken = replace(open_weights(path).model, dropout=m.dropout, attention_dropout=m.attention_dropout)
    return replace(config, model=taken)


if __name__ == "__main__":
    from megacore.exits import run

    sys.exit(run("megacore.launch.train", sys.argv[1:]))
