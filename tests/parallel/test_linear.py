"""Column- and row-parallel layers against the whole product, forward and backward, two microbatches each."""

from itertools import product

import pytest
from torch import Tensor

from megacore.layout import Segment
from megacore.mesh.collectives import all_reduce
from megacore.mesh.group import CommLog
from megacore.parallel.linear import ColumnParallelLinear, RowParallelLinear, column_parallel
from megacore.parallel.tensor import TensorParallel
from megacore.spec import ParamSpec
from megacore.spec.params import columns, rows
from tests.parallel.ranks import close, maker, numbers, own, own_tokens, surroundings
from tests.pool import WorkerPool

TOKENS, WIDE, NARROW = 8, 11, 5  # 11 is ragged over 2 and 4 ranks
WORLDS = (1, 2, 4)
BIAS = 77  # seed


def specs(kind: str, bias: bool) -> tuple[ParamSpec, ...]:
    if kind == "column":
        split = rows(Segment(WIDE))
        weight, bias_spec = (
            ParamSpec("weight", (WIDE, NARROW), split, std=1.0),
            ParamSpec("bias", (WIDE,), split, init="zeros"),
        )
    else:
        weight = ParamSpec("weight", (NARROW, WIDE), columns(Segment(WIDE)), std=1.0)
        bias_spec = ParamSpec("bias", (NARROW,), init="zeros")
    return (weight, bias_spec) if bias else (weight,)


def whole_product(wanted: tuple[ParamSpec, ...], seed: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Input, output, output's gradient and the parameters of the unsplit layer; gradients are in their ``.grad``."""
    make = maker(TensorParallel.single(), *wanted)
    params = [make(spec.name).detach() for spec in wanted]
    for bias in params[1:]:
        bias.copy_(numbers(BIAS, *bias.shape))
    for param in params:
        param.requires_grad_()
    x = numbers(seed, TOKENS, params[0].shape[1]).requires_grad_()
    y = x @ params[0].t() + (params[1] if len(params) > 1 else 0)
    grad = numbers(seed + 1, *y.shape)
    y.backward(grad)
    return x, y, grad, params


def split_layer(
    kind: str, wanted: tuple[ParamSpec, ...], tp: TensorParallel
) -> ColumnParallelLinear | RowParallelLinear:
    """The layer with the parameters of ``whole_product``."""
    layer = {"column": ColumnParallelLinear, "row": RowParallelLinear}[kind](maker(tp, *wanted), tp)
    for spec in wanted[1:]:
        layer.get_parameter(spec.name).data.copy_(own(numbers(BIAS, *spec.shape), spec, tp))
    return layer


def check_layer(rank: int, world: int, kind: str) -> None:
    for sequence, regather, bias, preset in product((False, True), repeat=4):
        tp = surroundings(rank, world, sequence, regather)
        wanted = specs(kind, bias)
        layer = split_layer(kind, wanted, tp)
        assert (layer.bias is not None) == bias
        before = {spec.name: numbers(90, *spec.shape) if preset else 0 * numbers(0, *spec.shape) for spec in wanted}
        buffers = {}
        for spec in wanted:
            if preset:
                buffers[spec.name] = layer.get_parameter(spec.name).grad = own(before[spec.name], spec, tp).clone()
        for seed in (10, 20):
            check_microbatch(layer, kind, wanted, tp, seed, before)
        for name, buffer in buffers.items():  # gradients are added where the buffer is, not beside it
            grad = layer.get_parameter(name).grad
            assert grad is not None
            assert grad.data_ptr() == buffer.data_ptr()


def check_microbatch(
    layer: ColumnParallelLinear | RowParallelLinear,
    kind: str,
    wanted: tuple[ParamSpec, ...],
    tp: TensorParallel,
    seed: int,
    before: dict[str, Tensor],
) -> None:
    """Compares one microbatch; adds the whole gradients to ``before``, which the layer's must equal then."""
    x, y, grad, params = whole_product(wanted, seed)
    what = f"{kind} {tp} seed {seed}"
    across = ParamSpec("y", (TOKENS, WIDE), columns(Segment(WIDE)))

    def local(whole: Tensor, split: bool) -> Tensor:
        return own(whole, across, tp).contiguous() if split else own_tokens(whole, tp)

    is_row = kind == "row"
    own_x = local(x.detach(), is_row).requires_grad_()
    own_y = layer(own_x)
    close(own_y, local(y.detach(), not is_row), f"{what}: y")
    own_y.backward(local(grad, not is_row))
    assert x.grad is not None
    close(own_x.grad, local(x.grad, is_row), f"{what}: x's gradient")
    for spec, param in zip(wanted, params, strict=True):
        assert param.grad is not None
        before[spec.name] = before[spec.name] + param.grad
        got = layer.get_parameter(spec.name).grad
        if is_row and tp.sequence and spec.name == "bias":
            continue  # a part of the whole: compared below
        close(got, own(before[spec.name], spec, tp), f"{what}: {spec.name}'s gradient")


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("world", WORLDS)
def test_a_split_layer_is_the_whole_layer(pool: WorkerPool, world: int, kind: str) -> None:
    """With and without sequence parallelism, gathering again, a bias, and a gradient buffer that is there already."""
    pool.run(check_layer, world, world, kind)


def check_partial_bias(rank: int, world: int) -> None:
    tp = surroundings(rank, world, sequence=True)
    wanted = specs("row", bias=True)
    layer = split_layer("row", wanted, tp)
    x, _, grad, (_, bias) = whole_product(wanted, 10)
    across = ParamSpec("x", (TOKENS, WIDE), columns(Segment(WIDE)))
    layer(own(x.detach(), across, tp)).backward(own_tokens(grad, tp))
    assert layer.bias is not None
    assert layer.bias.grad is not None
    assert bias.grad is not None
    close(all_reduce(layer.bias.grad, tp.group), bias.grad, "sum of the shards' bias gradients")


def test_shards_of_the_sequence_give_parts_of_a_row_bias_gradient(pool: WorkerPool) -> None:
    pool.run(check_partial_bias, 2, 2)


def collectives(rank: int, world: int, sequence: bool, regather: bool) -> list[list[tuple[str, int]]]:
    """What a column and a row layer send: forward, then backward of each."""
    log = CommLog()
    tp = surroundings(rank, world, sequence, regather, log)
    said = []
    for kind in ("column", "row"):
        wanted = specs(kind, bias=True)
        x, _, grad, _ = whole_product(wanted, 10)
        across = ParamSpec("", (TOKENS, WIDE), columns(Segment(WIDE)))
        own_x = own(x.detach(), across, tp) if kind == "row" else own_tokens(x.detach(), tp)
        y = split_layer(kind, wanted, tp)(own_x.requires_grad_())
        said.append([(record.operation, record.num_elements) for record in log])
        log.clear()
        y.backward(own(grad, across, tp) if kind == "column" else own_tokens(grad, tp))
        said.append([(record.operation, record.num_elements) for record in log])
        log.clear()
    return said


@pytest.mark.parametrize(
    ("sequence", "regather", "expected"),
    [
        (False, False, [[], ["all_reduce"], ["all_reduce"], []]),
        (True, False, [["all_gather"], ["reduce_scatter"], ["reduce_scatter"], ["all_gather"]]),
        (True, True, [["all_gather"], ["all_gather", "reduce_scatter"], ["reduce_scatter"], ["all_gather"]]),
    ],
)
def test_what_layers_send(pool: WorkerPool, sequence: bool, regather: bool, expected: list[list[str]]) -> None:
    """Each message is the size of the activations [t, h], never of a weight."""
    for said in pool.run(collectives, 2, 2, sequence, regather):
        assert said == [[(name, TOKENS * NARROW) for name in names] for names in expected]
    assert pool.run(collectives, 1, 1, sequence, regather) == [[[], [], [], []]]


def check_borrowed(rank: int, world: int) -> None:
    tp = surroundings(rank, world)
    (spec,) = wanted = specs("column", bias=False)
    weight = maker(tp, *wanted)("weight")
    x, y, grad, (param,) = whole_product(wanted, 10)
    across = ParamSpec("y", (TOKENS, WIDE), columns(Segment(WIDE)))
    own_y = column_parallel(x.detach(), weight, tp)
    close(own_y, own(y, across, tp), "y")
    own_y.backward(own(grad, across, tp))
    assert param.grad is not None
    close(weight.grad, own(param.grad, spec, tp), "gradient")


@pytest.mark.parametrize("world", [1, 2])
def test_a_weight_that_lives_elsewhere(pool: WorkerPool, world: int) -> None:
    pool.run(check_borrowed, world, world)
