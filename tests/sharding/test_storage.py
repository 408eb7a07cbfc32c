"""Every ZeRO stage leaves each rank with the whole model's gradients of what it owns, and with all updated weights."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from megacore.config.resolve import resolve_model
from megacore.config.schema import ModelConfig
from megacore.layout import Layout
from megacore.layout.policy import ShardingPolicy
from megacore.mesh.group import Group
from megacore.mesh.mesh import ParallelMesh
from megacore.parallel.parameters import ParameterMaker
from megacore.sharding import storage as storage_module
from megacore.sharding.storage import Numbers, Storage, Unit
from megacore.spec import ModelSpec, ParamSpec
from tests.pool import WorkerPool

CPU = torch.device("cpu")
# Ragged vocabulary, one kv head for two ranks, more ranks than vocabulary rows, biases, norms of heads.
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
LAYOUTS = (
    Layout(),
    Layout(tp=4),
    Layout(dp=3, dp_shard=3),
    Layout(tp=2, dp=2, dp_shard=2),
    Layout(dp=4, dp_shard=2),
)


def numbers_of(rank: int, place: int, shape: tuple[int, ...]) -> Tensor:
    """What rank ``rank`` has computed of a gradient; any rank can make any other's."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * rank + place), dtype=torch.float64)


def rows_of(spec: ParamSpec, index: int, num: int) -> Tensor:
    """The global rows of the split dim that a member holds, in local order."""
    return torch.cat([torch.arange(p.start, p.start + p.size) for p in spec.pieces(index, num)] or [torch.arange(0)])


def expected(spec: ParamSpec, place: int, layout: Layout, rank: int) -> Tensor:
    """The sum of all ranks' parts, of what ``rank`` holds."""
    whole, own = torch.zeros(spec.shape, dtype=torch.float64), layout.coordinate(rank)["tp"]
    for other in range(layout.world):
        index = layout.coordinate(other)["tp"]
        if spec.split is None and "tp" not in spec.partial and index != own:
            continue  # ranks of one tp group have it whole already
        part = numbers_of(other, place, spec.local_shape(index, layout.tp))
        whole.index_add_(spec.dim, rows_of(spec, index, layout.tp), part)
    return whole.index_select(spec.dim, rows_of(spec, own, layout.tp))


def units_of(spec: ModelSpec, mesh: ParallelMesh) -> Iterator[tuple[Unit, dict[str, nn.Parameter]]]:
    """Two stages: embedding and a block; a block and the head."""
    places = ((0, 0), (0, 1), (1, 0), (1, 1))
    for place, layer in zip(places, (spec.embedding, *spec.blocks, spec.head), strict=True):
        shapes = {param.name: param.local_shape(mesh.tp.rank, mesh.tp.size) for param in layer.params}
        yield place, {name: nn.Parameter(torch.empty(shape, dtype=torch.float64)) for name, shape in shapes.items()}


def made(rank: int, layout: Layout, zero: int, sequence: bool = False, bucket_bytes: int = 1 << 25) -> Storage:
    mesh = ParallelMesh.build(layout, rank, CPU, max(1, layout.tp // MODEL.num_kv_heads))
    spec = ModelSpec.of(MODEL, sequence)
    units = dict(units_of(spec, mesh))
    with mock.patch.object(storage_module, "BUCKET_BYTES", bucket_bytes):
        return Storage(
            units,
            spec.by_name,
            mesh,
            ShardingPolicy.of(zero),
            Numbers(torch.float64, torch.float64),
            lambda name, tensor: tensor.fill_(len(name)),
            alone=("embedding.tokens.weight",),
        )


def backward(storage: Storage, rank: int, microbatch: float) -> None:
    """Adds to the gradients as a model's backward does, unit after unit, and has them summed."""
    places = {spec.name: place for place, spec in enumerate(storage.specs.values())}
    by_unit = storage.policy.by_unit
    for unit in [(1, 1), (1, 0), (0, 1), (0, 0)] if by_unit else [(1, -1), (0, -1)]:
        if storage.policy.params:
            storage.gather(unit)
        if by_unit:
            storage.use(unit, backward=True)
        for bucket in storage.buckets[unit]:
            for slot in storage.lending.slots[bucket]:
                param = storage.parameters[slot.name]
                assert param.numel() == 0 or param.flatten()[-1] == len(slot.name), "the parameter is in its place"
                assert param.grad is not None
                param.grad += microbatch * numbers_of(rank, places[slot.name], slot.shape)
        if by_unit or microbatch > 1:
            storage.reduce(unit)
        if storage.policy.params:
            storage.free(unit)
            names = [slot.name for bucket in storage.buckets[unit] for slot in storage.lending.slots[bucket]]
            assert all(storage.parameters[name].isnan().all() for name in names), "freed parameters cannot be used"


def steps_of_rank(rank: int, layout: Layout, zero: int, sequence: bool, bucket_bytes: int) -> tuple[int, int, int]:
    storage = made(rank, layout, zero, sequence, bucket_bytes)
    for _ in range(2):  # buffers that go round are clean again
        storage.begin()
        for microbatch in (1.0, 2.0):
            backward(storage, rank, microbatch)
        storage.finish()
        places = {spec.name: place for place, spec in enumerate(storage.specs.values())}
        for run, grad in zip(storage.runs, storage.own_grads, strict=True):
            want = 3 * expected(storage.specs[run.name], places[run.name], layout, rank).flatten()[run.start : run.stop]
            torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-12, msg=run.name)
    for run, weight in zip(storage.runs, storage.weights, strict=True):
        weight += torch.arange(run.start, run.stop)
    storage.publish()
    for name, view in storage.whole("params").views().items():
        assert torch.equal(view.flatten(), len(name) + torch.arange(view.numel(), dtype=torch.float64)), name
    return len(storage.layout.buckets), storage.params.numel(), storage.grads.numel()


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_every_rank_owns_whole_sums_and_gets_all_weights(
    pool: WorkerPool, layout: Layout, zero: int, sequence: bool
) -> None:
    for num_buckets, params, grads in pool.run(steps_of_rank, layout.world, layout, zero, sequence, 1 << 25):
        assert num_buckets == (5 if zero >= 2 else 3), "units, or stages; and the parameter that has one of its own"
        shards = layout.dp_shard if zero else 1
        assert (grads * shards == params) if zero == 2 else grads == params


@pytest.mark.parametrize("zero", [0, 1])
def test_small_buckets_change_nothing(pool: WorkerPool, zero: int) -> None:
    layout = Layout(tp=2, dp=2, dp_shard=2)
    assert min(each[0] for each in pool.run(steps_of_rank, 4, layout, zero, False, 500)) > 8


def test_gaps_stay_zero() -> None:
    storage = made(0, Layout(), 0)
    for view in (*storage.whole("params").views().values(), *storage.whole("grads").views().values()):
        view.zero_()
    assert not storage.params.any()
    assert not storage.grads.any()


def test_master_weights_keep_what_16_bits_lose() -> None:
    mesh, param = ParallelMesh.single(), nn.Parameter(torch.empty(5, dtype=torch.bfloat16))
    specs = {"w": ParamSpec("w", (5,))}
    numbers = Numbers(torch.bfloat16, torch.float32, torch.float32)
    storage = Storage({(0, 0): {"w": param}}, specs, mesh, ShardingPolicy(), numbers, lambda _, x: x.fill_(1.0))
    (param.float() * torch.arange(5)).sum().backward()  # autograd's own gradient joins the fp32 ones
    assert param.grad is None
    assert torch.equal(storage.own_grads[0], torch.arange(5, dtype=torch.float32))
    for _ in range(4):
        storage.weights[0].add_(2**-9)  # half of bfloat16's last bit of 1
        storage.publish()
    assert storage.weights[0].tolist() == [1 + 2**-7] * 5
    assert param.tolist() == [1 + 2**-7] * 5


@pytest.mark.parametrize("zero", [0, 3])
def test_parameters_need_no_memory_before_they_have_a_place(zero: int) -> None:
    """A stage that is whole nowhere can be built: until storage places it, a parameter is a shape."""
    spec = ModelSpec.of(MODEL)
    make = ParameterMaker(spec.by_name, Group.single("tp"), CPU, torch.float32, seed=1, filled=False)
    param = make("embedding.positions.weight")
    assert param.shape == (8, 10) and param.untyped_storage().nbytes() == 4 and param.isnan().all()
    numbers = Numbers(torch.float32, torch.float32)
    storage = Storage(
        {(0, 0): {"embedding.positions.weight": param}},
        spec.by_name,
        ParallelMesh.single(),
        ShardingPolicy.of(zero),
        numbers,
        lambda name, tensor: tensor.fill_(3.0),
    )
    if zero == 3:
        storage.gather((0, 0))
    storage.use((0, 0), backward=False)
    assert (param == 3).all()
