"""Runs the engine on made-up tokens and puts the ranks' parts of its gradients together again."""

from dataclasses import replace

import torch
from torch import Tensor

from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.config.schema import RunConfig
from megacore.config.validate import check
from megacore.mesh.group import CommLog
from megacore.mesh.rank_info import RankInfo
from megacore.model.inputs import Inputs
from megacore.train.build import Built, build

BASE = (
    "model.num_layers=3",
    "model.hidden_size=24",
    "model.ffn_hidden_size=36",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=6",
    "model.vocab_size=1003",
    "train.seq_len=16",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    "precision.dtype=fp64",
    "data.blend=unused",
)
CPU = torch.device("cpu")


def run_config(world_size: int, *overrides: str) -> RunConfig:
    """A small checked and resolved run in float64."""
    config = load(None, [*BASE, *overrides])
    check(config, world_size)
    return resolve(config, world_size)


def batch_of(config: RunConfig, step: int) -> Inputs:
    """A whole global batch; some tokens are no targets, and unevenly many per sample."""
    generator = torch.Generator().manual_seed(step)
    size, length = config.train.global_batch_size, config.train.seq_len
    # small numbers are frequent, so there is something to learn
    chance = torch.rand((size, length + 1), generator=generator, dtype=torch.float64)
    tokens = (chance**6 * config.model.vocab_size).long()
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < torch.linspace(0, 0.6, size)[:, None]] = -100
    ordinals = torch.arange(size) + size * (step - 1)
    documents = torch.rand(labels.shape, generator=generator).lt(0.1).cumsum(1) if config.data.reset_attention else None
    return Inputs(tokens[:, :-1].contiguous(), labels, ordinals, document_bs=documents)


def microbatches_of(whole: Inputs, config: RunConfig, dp_rank: int, dp_size: int) -> list[Inputs]:
    """The rank's microbatches: number i of the batch belongs to rank i % dp."""
    size = config.train.micro_batch_size
    firsts = range(dp_rank * size, config.train.global_batch_size, dp_size * size)
    return [
        replace(
            whole,
            token_bs=whole.token_bs[first : first + size],
            label_bs=whole.label_bs[first : first + size],
            ordinal_b=whole.ordinal_b[first : first + size],
            document_bs=None if whole.document_bs is None else whole.document_bs[first : first + size],
        )
        for first in firsts
    ]


def built_rank(rank: int, world_size: int, config: RunConfig, log: CommLog | None = None) -> Built:
    return build(config, RankInfo(rank, world_size, rank, world_size), CPU, log=log)


def step_of(built: Built, step: int, lr: float = 0.0) -> tuple[float, float]:
    """Take one step; (loss, gradient norm)."""
    config, dp = built.config, built.mesh.dp
    whole = batch_of(config, step)
    nominal = config.train.global_batch_size * config.train.seq_len
    result = built.trainer.step(microbatches_of(whole, config, dp.rank, dp.size), nominal, lr)
    return result.loss.item(), result.grad_norm.item()


Part = tuple[str, int, int, int, Tensor]


def parts(built: Built, which: str) -> list[Part]:
    """This rank's (name, dim, start, size, tensor) pieces of the `params` or `grads`, owned or copied."""
    views = getattr(built.flat, which).views()
    tp = built.mesh.tp
    return [
        (
            spec.name,
            spec.dim,
            piece.start,
            piece.size,
            views[spec.name].narrow(spec.dim, piece.local, piece.size).clone(),
        )
        for spec in built.spec.params
        if spec.name in views
        for piece in spec.pieces(tp.rank, tp.size)
    ]


def assemble(config: RunConfig, of_ranks: list[list[Part]]) -> dict[str, Tensor]:
    """Global tensors from all ranks' parts; copies must agree bit for bit."""
    from megacore.spec import ModelSpec

    whole = {
        spec.name: torch.full(spec.shape, torch.nan, dtype=torch.float64) for spec in ModelSpec.of(config.model).params
    }
    for rank_parts in of_ranks:
        for name, dim, start, size, tensor in rank_parts:
            place = whole[name].narrow(dim, start, size)
            assert place.isnan().all() or torch.equal(place, tensor), f"{name}: copies differ"
            place.copy_(tensor)
    assert not any(tensor.isnan().any() for tensor in whole.values()), "some part of a parameter belongs to no rank"
    return whole


def worst_difference(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest |a-b| / max(|b|, 1e-4 * global norm) over all parameters, and whose it is."""
    floor = 1e-4 * torch.stack([tensor.norm() for tensor in expected.values()]).norm()
    assert ours.keys() == expected.keys()
    return max((((ours[name] - b).abs() / b.abs().clamp(min=floor)).max().item(), name) for name, b in expected.items())
