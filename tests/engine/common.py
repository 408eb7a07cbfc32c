"""Runs the engine on made-up tokens and puts the ranks' parts of its gradients together again."""

import torch
from torch import Tensor

from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.config.schema import RunConfig
from megacore.config.validate import check
from megacore.mesh.group import CommLog
from megacore.mesh.rank_info import RankInfo
from megacore.model.inputs import Inputs
from megacore.spec import ModelSpec
from megacore.spec.settings import settings_of
from megacore.train.build import Built, build
from megacore.verify.measure import Piece, pieces_of
from megacore.verify.samples import dealt, made_up

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
Part = Piece
batch_of = made_up
"""The whole global batch of a step."""


def run_config(world_size: int, *overrides: str) -> RunConfig:
    """A small checked and resolved run in float64."""
    config = load(None, [*BASE, *overrides])
    check(config, world_size)
    return resolve(config, world_size)


def microbatches_of(whole: Inputs, config: RunConfig, dp_rank: int, dp_size: int) -> list[Inputs]:
    """The rank's microbatches of a global batch."""
    return dealt(whole, config, dp_rank, dp_size, CPU)


def built_rank(rank: int, world_size: int, config: RunConfig, log: CommLog | None = None) -> Built:
    return build(config, RankInfo(rank, world_size, rank, world_size), CPU, log=log)


def step_of(built: Built, step: int, lr: float = 0.0) -> tuple[float, float]:
    """Take one step; (loss, gradient norm)."""
    config, dp = built.config, built.mesh.dp
    nominal = config.train.global_batch_size * config.train.seq_len
    result = built.trainer.step(microbatches_of(batch_of(config, step), config, dp.rank, dp.size), nominal, lr)
    return result.loss.item(), result.grad_norm.item()


def parts(built: Built, which: str) -> list[Piece]:
    """This rank's pieces of the `params` or `grads`, owned or copied, as they are now."""
    tp = built.mesh.tp
    pieces = pieces_of(built.storage.whole(which), built.spec.params, tp.rank, tp.size)
    return [piece._replace(tensor=piece.tensor.clone()) for piece in pieces]


def assemble(config: RunConfig, of_ranks: list[list[Piece]]) -> dict[str, Tensor]:
    """Global tensors of what is trained from all ranks' parts; copies must agree bit for bit."""
    params = ModelSpec.of(config.model).params
    of = settings_of(params, config.optim)
    trained = (spec for spec in params if not of[spec.name].frozen)
    whole = {spec.name: torch.full(spec.shape, torch.nan, dtype=torch.float64) for spec in trained}
    for rank_parts in of_ranks:
        for piece in rank_parts:
            place = piece.of(whole[piece.name])
            assert place.isnan().all() or torch.equal(place, piece.tensor), f"{piece.name}: copies differ"
            place.copy_(piece.tensor)
    assert not any(tensor.isnan().any() for tensor in whole.values()), "some part of a parameter belongs to no rank"
    return whole


def worst_difference(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest |a-b| / max(|b|, 1e-4 * global norm) over all parameters, and whose it is."""
    floor = 1e-4 * torch.stack([tensor.norm() for tensor in expected.values()]).norm()
    assert ours.keys() == expected.keys()
    return max((((ours[name] - b).abs() / b.abs().clamp(min=floor)).max().item(), name) for name, b in expected.items())
