"""One training step under ZeRO 1 to 3: the engine against DDP, ZeroRedundancyOptimizer and FSDP2.

All sides live in the same processes, start from the same weights, take the same share of a batch in the same
microbatches, and take turns (see `harness`). A step is forward, backward, sums over ranks, clipping by the norm over
all of them and AdamW.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, distributed

from megacore.bench.baselines.fsdp import sharded_step
from megacore.bench.baselines.plain_llama import PlainLlama, Step
from megacore.bench.baselines.zero_redundancy import replicated_step
from megacore.bench.harness import Comparison, alternate, case_named, comparison
from megacore.bench.ranks import time_on_all
from megacore.bench.train import OURS, check_losses
from megacore.bench.weights import plain_weights
from megacore.config.resolve import resolve
from megacore.config.schema import ParallelConfig, RunConfig
from megacore.mesh.rank_info import RankInfo
from megacore.model.inputs import Inputs
from megacore.train.build import Built, build

DDP, SHARED = "ddp", "ddp, ZeroRedundancyOptimizer"
FSDP, FSDP_KEEPS, FSDP_WAITS = "fsdp2", "fsdp2, parameters stay", "fsdp2, sums wait"

CHECKED_STEPS = 3
SAME_LOSS = 1e-4
"""From the same weights, fp32 losses of the first steps differ by less than this share."""


@dataclass(frozen=True)
class Case:
    """One benchmark: a ZeRO stage over so many ranks, and what it is held against."""

    zero: int
    dp: int
    rivals: tuple[str, ...]
    num_microbatches: int = 1

    @property
    def name(self) -> str:
        accumulated = f"-x{self.num_microbatches}" if self.num_microbatches > 1 else ""
        return f"zero{self.zero}-dp{self.dp}{accumulated}"


CASES = (
    Case(1, 2, (DDP, SHARED)),
    Case(1, 4, (DDP, SHARED)),
    Case(1, 2, (DDP, SHARED), num_microbatches=4),
    Case(2, 2, (FSDP_KEEPS,)),
    Case(3, 2, (FSDP, FSDP_KEEPS)),
    Case(3, 4, (FSDP, FSDP_KEEPS)),
    Case(3, 2, (FSDP, FSDP_KEEPS, FSDP_WAITS), num_microbatches=4),
)


def lay_out(config: RunConfig, case: Case) -> RunConfig:
    """The resolved run of a case. Raises ValueError for a batch that does not fall into its microbatches."""
    batch, parts = config.train.global_batch_size, case.dp * case.num_microbatches
    if batch % parts:
        raise ValueError(
            f"train.global_batch_size={batch} must be a multiple of {parts} here: of {case.dp} ranks times "
            f"{case.num_microbatches} microbatches"
        )
    train = replace(config.train, micro_batch_size=batch // parts)
    return resolve(replace(config, train=train, parallel=ParallelConfig(dp=case.dp, zero=case.zero)), case.dp)


def engine_step(built: Built) -> Step:
    """The engine's own step on a rank's share of the batch, given by hand."""
    train = built.config.train
    num_nominal, lr = train.global_batch_size * train.seq_len, built.config.optim.lr
    ordinal_b = torch.arange(train.micro_batch_size)

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        cut = zip(tokens.split(train.micro_batch_size), labels.split(train.micro_batch_size), strict=True)
        return built.trainer.step([Inputs(*each, ordinal_b) for each in cut], num_nominal, lr).loss

    return step


def rival_steps(built: Built, case: Case) -> dict[str, Step]:
    """torch's, each from the weights that the engine has now; every rank of it must call this."""
    config, optim, number = built.config, built.config.optim, case.num_microbatches
    weights = plain_weights(config.model, built.storage.whole("params").views())
    group = distributed.new_group()  # messages of their own
    mesh = distributed.device_mesh.DeviceMesh.from_group(group, "cpu")

    def model() -> PlainLlama:
        plain = PlainLlama(config.model, config.train.seq_len)
        plain.load_state_dict(weights)
        return plain

    make = {
        DDP: lambda: replicated_step(model(), optim, number, shared=False, group=group),
        SHARED: lambda: replicated_step(model(), optim, number, shared=True, group=group),
        FSDP: lambda: sharded_step(model(), optim, number, mesh, free_after_forward=True),
        FSDP_KEEPS: lambda: sharded_step(model(), optim, number, mesh, free_after_forward=False),
        FSDP_WAITS: lambda: sharded_step(model(), optim, number, mesh, free_after_forward=True, sum_each=False),
    }
    return {name: make[name]() for name in case.rivals}


def measure(info: RankInfo, case_name: str, config: RunConfig, rounds: int, result: str) -> None:
    """One rank's part of a case; rank 0 writes the seconds of every side and round to the JSON file ``result``."""
    case = case_named(case_name, CASES)
    time_on_all(info, 1, lambda: time_sides(info, case, config, rounds), result)


def time_sides(info: RankInfo, case: Case, config: RunConfig, rounds: int) -> dict[str, list[float]]:
    """This rank's seconds of each side and round, after all sides have shown that they compute the same."""
    built = build(lay_out(config, case), info, torch.device("cpu"))
    rivals = rival_steps(built, case)
    steps: dict[str, Step] = {OURS: engine_step(built), **rivals}
    tokens, labels = batch_of(built.config, info.rank)
    for _ in range(CHECKED_STEPS):
        check_losses(losses_of(steps, tokens, labels), SAME_LOSS)
    calls = {name: partial(step, tokens, labels) for name, step in steps.items()}
    return alternate(calls, rounds, before=distributed.barrier)


def losses_of(steps: Mapping[str, Step], tokens: Tensor, labels: Tensor) -> dict[str, float]:
    """The whole batch's loss by every side after a step of it; torch's know only the loss of a rank's own share."""
    losses = {name: step(tokens, labels).double() for name, step in steps.items()}
    for name, loss in losses.items():
        if name != OURS:
            distributed.all_reduce(loss)
            loss /= distributed.get_world_size()
    return {name: loss.item() for name, loss in losses.items()}


def batch_of(config: RunConfig, rank: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels [b / dp, s] of one rank."""
    shape = config.train.global_batch_size, config.train.seq_len + 1
    text = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    share = text.chunk(config.parallel.dp)[rank]
    return share[:, :-1].contiguous(), share[:, 1:].contiguous()


def collect(case: Case, config: RunConfig, result: Path) -> Comparison:
    """The comparison whose timings ``measure`` wrote."""
    model, train = config.model, config.train
    settings = {
        "processes": case.dp,
        "threads": 1,
        "zero": case.zero,
        "microbatches": case.num_microbatches,
        "layers": model.num_layers,
        "hidden": model.hidden_size,
        "vocabulary": model.vocab_size,
        "sequence": train.seq_len,
        "batch": train.global_batch_size,
    }
    return comparison(case.name, OURS, json.loads(result.read_text()), settings)
