"""One training step of a pipeline: the engine against torch.distributed.pipelining.

Both live in the same processes, cut the same model into the same stages, start from the same weights and take turns on
the same microbatches (see `harness`). A step is forward, backward, clipping over all ranks and AdamW.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, distributed

from megacore.bench.baselines.plain_llama import PlainLlama
from megacore.bench.baselines.torch_pipelining import TorchPipeline
from megacore.bench.harness import Comparison, alternate, case_named, comparison
from megacore.bench.ranks import time_on_all
from megacore.bench.train import OURS, check_losses
from megacore.bench.weights import plain_weights
from megacore.config.resolve import resolve
from megacore.config.schema import ParallelConfig, RunConfig
from megacore.mesh.rank_info import RankInfo
from megacore.model.inputs import Inputs
from megacore.spec.stages import layers_of_stages
from megacore.train.build import Built, build

Step = Callable[[Tensor, Tensor], Tensor | None]
"""(tokens, labels [b, s] of the whole batch) -> the mean loss, on the ranks that know it; weights updated."""

SHAPE = (
    "model.num_layers=8",
    "train.micro_batch_size=2",
    "train.global_batch_size=16",
)
"""Where it differs from what `train` measures: layers enough for 4 ranks x 2 stages, and 8 microbatches."""

CHECKED_STEPS = 3
SAME_LOSS = 1e-4
"""From the same weights, fp32 losses of the first steps differ by less than this share."""


@dataclass(frozen=True)
class Case:
    """One benchmark: a schedule on so many ranks; torch's classes by the engine's names for their schedules."""

    schedule: str
    pp: int
    chunks: int = 1
    rivals: tuple[str, ...] = ("interleaved",)

    @property
    def name(self) -> str:
        return f"{self.schedule}-pp{self.pp}"


CASES = tuple(
    case
    for pp in (2, 4)
    for case in (Case("1f1b", pp, rivals=("1f1b", "interleaved")), Case("interleaved", pp, chunks=2))
)


def lay_out(config: RunConfig, case: Case) -> RunConfig:
    """The resolved run of a case. Raises ValueError for numbers of microbatches that torch's schedules refuse."""
    batch, micro_batch = config.train.global_batch_size, config.train.micro_batch_size
    if batch % (micro_batch * case.pp):
        raise ValueError(
            f"train.global_batch_size={batch} must be a multiple of {micro_batch * case.pp} here: of micro_batch_size="
            f"{micro_batch} times {case.pp} ranks"
        )
    parallel = ParallelConfig(pp=case.pp, chunks=case.chunks, schedule=case.schedule)
    return resolve(replace(config, parallel=parallel), case.pp)


def engine_step(built: Built) -> Step:
    """The engine's own step on tokens given by hand."""
    train = built.config.train
    num_nominal, lr = train.global_batch_size * train.seq_len, built.config.optim.lr
    ordinals = torch.arange(train.global_batch_size).split(train.micro_batch_size)

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        cut = zip(tokens.split(train.micro_batch_size), labels.split(train.micro_batch_size), ordinals, strict=True)
        return built.trainer.step([Inputs(*each) for each in cut], num_nominal, lr).loss

    return step


def torch_step(built: Built, schedule: str) -> Step:
    """torch's, from the weights that the engine has now."""
    model, train = built.config.model, built.config.train
    num_microbatches = train.global_batch_size // train.micro_batch_size
    layers = layers_of_stages(model, train.seq_len, built.config.parallel.pp * len(built.stages))
    pipeline = TorchPipeline(
        PlainLlama(model, train.seq_len),
        layers,
        built.config.optim,
        (train.micro_batch_size, train.seq_len),
        num_microbatches,
        schedule,
        distributed.new_group(),  # messages of their own
    )
    for number, stage in pipeline.stages.items():
        stage.load_state_dict(plain_weights(model, dict(built.stages[number].named_parameters())))
    return pipeline


def measure(info: RankInfo, case_name: str, config: RunConfig, rounds: int, result: str) -> None:
    """One rank's part of a case; rank 0 writes the seconds of every side and round to the JSON file ``result``."""
    case = case_named(case_name, CASES)
    time_on_all(info, 1, lambda: time_sides(info, case, config, rounds), result)


def time_sides(info: RankInfo, case: Case, config: RunConfig, rounds: int) -> dict[str, list[float]]:
    """This rank's seconds of each side and round, after all sides have shown that they compute the same."""
    built = build(lay_out(config, case), info, torch.device("cpu"))
    rivals = {f"torch, {schedule}": torch_step(built, schedule) for schedule in case.rivals}
    steps: dict[str, Step] = {OURS: engine_step(built), **rivals}
    tokens, labels = batch_of(built.config)
    for _ in range(CHECKED_STEPS):
        losses = {name: step(tokens, labels) for name, step in steps.items()}
        check_losses({name: loss.item() for name, loss in losses.items() if loss is not None}, SAME_LOSS)
    calls = {name: partial(step, tokens, labels) for name, step in steps.items()}
    return alternate(calls, rounds, before=distributed.barrier)


def batch_of(config: RunConfig) -> tuple[Tensor, Tensor]:
    """Tokens and labels [b, s], the same on every rank."""
    shape = config.train.global_batch_size, config.train.seq_len + 1
    text = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def collect(case: Case, config: RunConfig, result: Path) -> Comparison:
    """The comparison whose timings ``measure`` wrote."""
    model, train = config.model, config.train
    settings = {
        "processes": case.pp,
        "threads": 1,
        "stages": case.pp * case.chunks,
        "microbatches": train.global_batch_size // train.micro_batch_size,
        "layers": model.num_layers,
        "hidden": model.hidden_size,
        "vocabulary": model.vocab_size,
        "sequence": train.seq_len,
        "batch": train.global_batch_size,
    }
    return comparison(case.name, OURS, json.loads(result.read_text()), settings)
