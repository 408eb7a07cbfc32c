"""Gradient sums against adding up every rank's part, row by row of the global tensors."""

import pytest
import torch
from torch import Tensor

from megacore.config.resolve import resolve_model
from megacore.config.schema import ModelConfig
from megacore.layout import BufferLayout, Layout
from megacore.layout.buffer import groups_of_size
from megacore.mesh.mesh import ParallelMesh
from megacore.sharding.flat import FlatBuffer
from megacore.sharding.reduce import GradientReducer
from megacore.spec import ModelSpec, ParamSpec
from tests.pool import WorkerPool

CPU = torch.device("cpu")
MODEL = resolve_model(
    ModelConfig(
        num_layers=2,
        hidden_size=10,
        ffn_hidden_size=7,
        num_heads=4,
        num_kv_heads=2,
        head_dim=2,
        vocab_size=3,
        norm="layernorm",
        position="learned",
        qk_norm=True,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
    ),
    seq_len=8,
)


def part_of(rank: int, place: int, shape: tuple[int, ...]) -> Tensor:
    """What rank ``rank`` has computed of a gradient; any rank can make any other's."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * rank + place), dtype=torch.float64)


def rows_of(spec: ParamSpec, index: int, num: int) -> Tensor:
    """The global rows of the split dim that a member holds, in local order."""
    return torch.cat([torch.arange(p.start, p.start + p.size) for p in spec.pieces(index, num)] or [torch.arange(0)])


def expected(spec: ParamSpec, place: int, layout: Layout, rank: int) -> Tensor:
    tp = layout.tp
    at = layout.coordinate(rank)
    whole = torch.zeros(spec.shape, dtype=torch.float64)
    for other in range(layout.world):
        index = layout.coordinate(other)["tp"]
        if spec.split is None and "tp" not in spec.partial and index != at["tp"]:
            continue  # ranks of one tp group have it whole already
        part = part_of(other, place, spec.local_shape(index, tp))
        whole.index_add_(spec.dim, rows_of(spec, index, tp), part)
    return whole.index_select(spec.dim, rows_of(spec, at["tp"], tp))


def reduce_on_rank(rank: int, layout: Layout, sequence: bool, num_elements: int, two_stages: bool = False) -> int:
    mesh = ParallelMesh.build(layout, rank, CPU, max(1, layout.tp // MODEL.num_kv_heads))
    params = ModelSpec.of(MODEL, sequence).params
    shapes = [(spec.name, spec.local_shape(mesh.tp.rank, mesh.tp.size)) for spec in params]
    cut = {0: shapes[:5], 3: shapes[5:]} if two_stages else {0: shapes}
    groups = [group for own in cut.values() for group in groups_of_size(own, num_elements)]
    grads = FlatBuffer.zeros(BufferLayout.in_buckets(groups), torch.float64, CPU)
    for place, (name, shape) in enumerate(shapes):
        grads.views()[name].copy_(part_of(rank, place, shape))
    names = {stage: [name for name, _ in own] for stage, own in cut.items()}
    reducer = GradientReducer(grads, {spec.name: spec for spec in params}, mesh, names)
    for stage in reversed(cut):
        reducer.start(stage)
    reducer.finish()
    for place, spec in enumerate(params):
        want = expected(spec, place, layout, rank)
        torch.testing.assert_close(grads.views()[spec.name], want, rtol=1e-13, atol=1e-13, msg=spec.name)
    for view in grads.views().values():
        view.zero_()
    assert not grads.data.any()  # the gaps
    return sum(len(stage.buckets) for stage in reducer.stages.values())


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(
    "layout",
    [Layout(tp=2), Layout(tp=4), Layout(dp=3, dp_shard=3), Layout(tp=2, dp=2, dp_shard=2)],
    ids=Layout.describe,
)
def test_every_rank_gets_the_whole_gradient_of_what_it_holds(pool: WorkerPool, layout: Layout, sequence: bool) -> None:
    assert pool.run(reduce_on_rank, layout.world, layout, sequence, 10**9) == [1] * layout.world


def test_the_number_of_buckets_changes_nothing(pool: WorkerPool) -> None:
    layout = Layout(tp=2, dp=2, dp_shard=2)
    assert min(pool.run(reduce_on_rank, 4, layout, False, 60)) > 3


def test_stages_are_summed_each_by_itself(pool: WorkerPool) -> None:
    layout = Layout(tp=2, dp=2, dp_shard=2)
    assert pool.run(reduce_on_rank, 4, layout, False, 10**9, True) == [2] * 4
