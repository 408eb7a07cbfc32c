"""A run in which one rank's memory fails: a bit of a weight flips after a step."""

import torch

from megacore.config.schema import RunConfig
from megacore.launch.train import parser, requested
from megacore.mesh.rank_info import RankInfo
from megacore.train.guards import Guards
from megacore.train.loop import train

TARGET = "tests.train.spoiling:spoilt"
SPOILT_RANK, AFTER_STEP, NAME = 1, 3, "layers.1.mlp.down.weight"


def config_of(words: list[str], world_size: int) -> RunConfig:
    return requested(parser().parse_intermixed_args([*words, "--nproc", str(world_size)]), None)[0]


def spoilt(info: RankInfo, config: RunConfig) -> int:
    after = Guards.after

    def flip_and_look(guards: Guards, step: int, *rest: object) -> None:
        if info.rank == SPOILT_RANK and step == AFTER_STEP:
            guards.storage.arrive()
            (weight,) = [w for run, w in zip(guards.storage.runs, guards.storage.weights) if run.name == NAME][:1]
            weight.view(torch.int64)[0] ^= 1 << 40
        after(guards, step, *rest)  # type: ignore[arg-type]

    Guards.after = flip_and_look  # type: ignore[method-assign]  # in this process of its own
    return train(info, config)
