"""The global norm counts each parameter once, whatever ranks hold copies or shards of it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megacore.config.resolve import resolve_model
from megacore.config.schema import ModelConfig
from megacore.layout import BufferLayout, Layout
from megacore.mesh.mesh import ParallelMesh
from megacore.optim.norm import GlobalNorm
from megacore.sharding.flat import FlatBuffer
from megacore.spec import ModelSpec, ParamSpec
from tests.pool import WorkerPool

CPU = torch.device("cpu")
# Ragged vocabulary and MLP, one kv head for all ranks, weights without rows on some ranks, biases, norms of heads.
MODEL = resolve_model(
    ModelConfig(
        num_layers=2,
        hidden_size=10,
        ffn_hidden_size=7,
        num_heads=4,
        num_kv_heads=2,
        head_dim=2,
        vocab_size=3,
        qk_norm=True,
        qkv_bias=True,
        mlp_bias=True,
    ),
    seq_len=8,
)


def whole_gradient(place: int, spec: ParamSpec) -> Tensor:
    return torch.randn(spec.shape, generator=torch.Generator().manual_seed(place), dtype=torch.float64) * (1 + place)


def norm_of_rank(rank: int, layout: Layout) -> float:
    mesh = ParallelMesh.build(layout, rank, CPU, max(1, layout.tp // MODEL.num_kv_heads))
    params = ModelSpec.of(MODEL).params
    shapes = [(spec.name, spec.local_shape(mesh.tp.rank, mesh.tp.size)) for spec in params]
    grads = FlatBuffer.zeros(BufferLayout.of(shapes), torch.float64, CPU)
    views = grads.views()
    for place, spec in enumerate(params):
        whole = whole_gradient(place, spec)
        for piece in spec.pieces(mesh.tp.rank, mesh.tp.size):
            own = whole.narrow(spec.dim, piece.start, piece.size)
            views[spec.name].narrow(spec.dim, piece.local, piece.size).copy_(own)
    norm = GlobalNorm(grads, params, mesh)()
    assert norm.dtype == torch.float64
    assert norm.shape == ()
    return norm.item()


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp=2), Layout(tp=4), Layout(dp=2, dp_shard=2), Layout(tp=2, dp=2, dp_shard=2)],
    ids=Layout.describe,
)
def test_norm_is_that_of_the_whole_gradient_on_every_rank(pool: WorkerPool, layout: Layout) -> None:
    params = ModelSpec.of(MODEL).params
    expected = torch.cat([whole_gradient(place, spec).reshape(-1) for place, spec in enumerate(params)]).norm().item()
    norms = pool.run(norm_of_rank, layout.world, layout)
    assert norms == pytest.approx([expected] * layout.world, rel=1e-14)
    assert len(set(norms)) == 1  # to the bit: ranks must agree on clipping


@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
def test_one_bad_number_shows(poison: float) -> None:
    params = ModelSpec.of(replace(MODEL, num_layers=1)).params
    grads = FlatBuffer.zeros(BufferLayout.of((spec.name, spec.shape) for spec in params), torch.float32, CPU)
    norm = GlobalNorm(grads, params, ParallelMesh.single())
    assert norm().item() == 0.0
    grads.views()["final_norm.weight"][3] = poison
    assert not norm().isfinite()
