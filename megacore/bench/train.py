"""One training step of the engine against the same step by plain PyTorch, transformers, DTensor and DDP.

All sides of a case live in the same processes, see the same tokens and take turns (see `harness`). A step is forward,
backward, gradient sums over ranks, clipping and AdamW.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, distributed

from megacore.bench.baselines.ddp import ddp_step
from megacore.bench.baselines.dtensor_tp import PLANS, dtensor_step
from megacore.bench.baselines.hf_llama import hf_step
from megacore.bench.baselines.plain_llama import PlainLlama, Step, training_step
from megacore.bench.harness import Comparison, alternate, case_named, comparison
from megacore.bench.ranks import time_on_all
from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.config.schema import ParallelConfig, RunConfig
from megacore.mesh.rank_info import RankInfo
from megacore.model.inputs import Inputs
from megacore.train.build import build

OURS = "megacore"

SHAPE = (
    "model.num_layers=6",
    "model.hidden_size=256",
    "model.ffn_hidden_size=688",
    "model.num_heads=8",
    "model.num_kv_heads=4",
    "model.vocab_size=8192",
    "train.seq_len=256",
    "train.global_batch_size=8",
)
"""A small Llama: large enough that matrix products count, small enough for many steps on a laptop."""

FEATURES = MappingProxyType(
    {"norm": "rmsnorm", "norm_placement": "pre", "activation": "swiglu", "position": "rope", "rotary_fraction": 1.0}
)
"""What the baselines can compute; the rest of the model's keys must be off."""

ABSENT = (
    "qk_norm",
    "qkv_bias",
    "attention_out_bias",
    "mlp_bias",
    "sliding_window",
    "dropout",
    "num_experts",
    "parallel_residual",
    "norm_unit_offset",
    "attention_softcap",
    "logit_softcap",
    "scale_embeddings",
    "attention_scale_dim",
)
"""Keys of what they leave out."""

SAME_LOSS = 0.05
"""Untrained models of one shape differ in their first loss by less than this share, whatever their random weights."""


@dataclass(frozen=True)
class Case:
    """One benchmark: its processes and threads, the engine's layout, and the sides besides the engine's own."""

    name: str
    nproc: int
    threads: int
    parallel: ParallelConfig
    rivals: Callable[[RunConfig], Mapping[str, Step]]


def single_rivals(config: RunConfig) -> dict[str, Step]:
    """Plain PyTorch with torch's two fast AdamWs, and transformers where it is installed."""
    model, optim, s = config.model, config.optim, config.train.seq_len
    steps = {
        "plain": training_step(PlainLlama(model, s), optim, fused=True),
        "plain, foreach": training_step(PlainLlama(model, s), optim, foreach=True),
    }
    if find_spec("transformers"):
        steps["transformers"] = hf_step(model, optim, s)
    return steps


def tp_rivals(config: RunConfig) -> dict[str, Step]:
    """DTensor by both of torchtitan's plans."""
    mesh = distributed.device_mesh.init_device_mesh("cpu", (distributed.get_world_size(),))
    model, optim, s = config.model, config.optim, config.train.seq_len
    return {f"dtensor, {plan}": dtensor_step(model, optim, s, mesh, plan) for plan in PLANS}


def dp_rivals(config: RunConfig) -> dict[str, Step]:
    """DistributedDataParallel."""
    return {"ddp": ddp_step(config.model, config.optim, config.train.seq_len)}


CASES = (
    Case("single-1-thread", 1, 1, ParallelConfig(), single_rivals),
    Case("single-2-threads", 1, 2, ParallelConfig(), single_rivals),
    Case("tp2", 2, 1, ParallelConfig(tp=2), tp_rivals),
    Case("dp2", 2, 1, ParallelConfig(dp=2), dp_rivals),
)


def configure(overrides: Sequence[str] = ()) -> RunConfig:
    """The run that all cases share, before a case lays it out. Raises ValueError for what the baselines cannot do."""
    config = load(None, [*SHAPE, *overrides])
    model = config.model
    wrong = [f"model.{key}={getattr(model, key)}" for key, value in FEATURES.items() if getattr(model, key) != value]
    wrong += [f"model.{key}={getattr(model, key)}" for key in ABSENT if getattr(model, key)]
    wrong += [f"model.{key}" for key in ("tie_embeddings", "attention_dropout") if getattr(model, key)]
    wrong += ["model.rope_scaling"] if model.rope_scaling.type != "none" else []
    wrong += [f"precision.dtype={config.precision.dtype}"] if config.precision.dtype != "fp32" else []
    wrong += [f"precision.fp8={config.precision.fp8}"] if config.precision.fp8 != "off" else []
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}: the baselines of this benchmark compute a plain Llama in fp32; leave it so"
        )
    return config


def lay_out(config: RunConfig, case: Case, parallel: ParallelConfig) -> RunConfig:
    """The engine's resolved run: one microbatch per rank and step, as the baselines have."""
    ranks = max(1, parallel.dp)
    if config.train.global_batch_size % ranks:
        raise ValueError(f"train.global_batch_size={config.train.global_batch_size} must be a multiple of {ranks} here")
    train = replace(config.train, micro_batch_size=config.train.global_batch_size // ranks)
    return resolve(replace(config, train=train, parallel=parallel), case.nproc)


def engine_step(config: RunConfig, info: RankInfo) -> Step:
    """The engine's own step on tokens given by hand."""
    trainer = build(config, info, torch.device("cpu")).trainer
    num_nominal = config.train.global_batch_size * config.train.seq_len
    ordinal_b = torch.arange(config.train.micro_batch_size)

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        return trainer.step([Inputs(tokens, labels, ordinal_b)], num_nominal, config.optim.lr).loss

    return step


def sides_of(case: Case, config: RunConfig, info: RankInfo) -> dict[str, Step]:
    """Every side's step, the engine's first; under tensor parallelism also with sequence parallelism."""
    run = lay_out(config, case, case.parallel)
    steps = {OURS: engine_step(run, info)}
    if case.parallel.tp > 1:
        parallel = replace(case.parallel, sequence_parallel=True)
        steps[f"{OURS}, sequence"] = engine_step(lay_out(config, case, parallel), info)
    return steps | dict(case.rivals(run))


def batch_of(config: RunConfig, case: Case, rank: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels [b, s] of one rank: all of the batch, or its share of it under data parallelism."""
    b, s = config.train.global_batch_size, config.train.seq_len
    text = torch.randint(config.model.vocab_size, (b, s + 1), generator=torch.Generator().manual_seed(0))
    share = text.chunk(max(1, case.parallel.dp))[rank if case.parallel.dp > 1 else 0]
    return share[:, :-1].contiguous(), share[:, 1:].contiguous()


def measure(info: RankInfo, case_name: str, config: RunConfig, rounds: int, result: str) -> None:
    """One rank's part of a case; rank 0 writes the seconds of every side and round to the JSON file `result`."""
    case = case_named(case_name, CASES)
    time_on_all(info, case.threads, lambda: time_sides(info, case, config, rounds), result)


def time_sides(info: RankInfo, case: Case, config: RunConfig, rounds: int) -> dict[str, list[float]]:
    """This rank's seconds of each side and round, after all sides have shown that they compute the same."""
    tokens, labels = batch_of(config, case, info.rank)
    steps = sides_of(case, config, info)
    check_losses({name: step(tokens, labels).item() for name, step in steps.items()})
    calls = {name: bind(step, tokens, labels) for name, step in steps.items()}
    return alternate(calls, rounds, before=distributed.barrier if info.world_size > 1 else (lambda: None))


def bind(step: Step, tokens: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """The step as a call without arguments."""
    return lambda: step(tokens, labels)


def check_losses(losses: Mapping[str, float], tolerance: float = SAME_LOSS) -> None:
    """Refuse to time sides that do not compute the same thing: losses differ by more than this share."""
    ours = losses[OURS]
    wrong = {name: loss for name, loss in losses.items() if not math.isclose(loss, ours, rel_tol=tolerance)}
    if wrong:
        raise RuntimeError(f"the sides compute different losses: {OURS} {ours}, {wrong}")


def collect(case: Case, config: RunConfig, result: Path) -> Comparison:
    """The comparison whose timings `measure` wrote."""
    model, train = config.model, config.train
    settings = {
        "processes": case.nproc,
        "threads": case.threads,
        "layers": model.num_layers,
        "hidden": model.hidden_size,
        "vocabulary": model.vocab_size,
        "sequence": train.seq_len,
        "batch": train.global_batch_size,
    }
    return comparison(case.name, OURS, json.loads(result.read_text()), settings)
