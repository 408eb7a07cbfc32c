"""What blocks save goes away and comes back in time. (That gradients keep every bit stands in test_recompute.)

The trips themselves need a GPU; here the CPU stands in its place, and order and choice are what is tested.
"""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from megacore.model import offload
from megacore.model.offload import Kept, _Trip, offloaded
from megacore.model.stage import Loss
from tests.model.stages import TINY, microbatch, stage_of

SIZE = 64  # 32 KiB of float64


class Layer:
    """y = sin(x w): saves its input, its weight and the product."""

    def __init__(self) -> None:
        self.weight = torch.randn(SIZE, SIZE, dtype=torch.float64).requires_grad_()

    def __call__(self, x: Tensor) -> Tensor:
        return (x @ self.weight).sin()


def chain(layers: list[Layer], x: Tensor, kept: list[Kept], all_kept: list[Kept]) -> Tensor:
    for layer in layers:
        x = offloaded(lambda x=x, layer=layer: layer(x), (layer.weight,), kept)  # type: ignore[misc]
        all_kept.extend(kept)
    return x


def test_weights_and_small_tensors_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(
        Kept, "pack", lambda self, tensor, pack=Kept.pack: sent.append(tensor.nbytes) or pack(self, tensor)
    )
    layer, kept = Layer(), list[Kept]()
    x = torch.randn(SIZE, SIZE, dtype=torch.float64).requires_grad_()
    y = offloaded(lambda: layer(x) * torch.ones((), dtype=torch.float64).requires_grad_(), (layer.weight,), kept)
    gone = [trip.host.nbytes for trip in kept[0].trips if trip is not None]
    assert len(gone) < len(sent) and min(sent) == 8 and set(gone) == {8 * SIZE * SIZE}
    assert len(gone) == 3, "the input, the product and its sine"
    y.sum().backward()
    assert kept[0].trips == [None] * 3


def test_a_block_is_called_back_while_the_one_above_it_is_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, kept, all_kept = [Layer() for _ in range(3)], list[Kept](), list[Kept]()
    told: list[tuple[str, int]] = []

    turn, arrive = _Trip.turn, _Trip.arrive
    owners: dict[int, int] = {}
    monkeypatch.setattr(_Trip, "turn", lambda trip: told.append(("back", owners[id(trip)])) or turn(trip))
    monkeypatch.setattr(_Trip, "arrive", lambda trip: told.append(("used", owners[id(trip)])) or arrive(trip))
    y = chain(layers, torch.randn(SIZE, SIZE, dtype=torch.float64).requires_grad_(), kept, all_kept)
    owners.update({id(trip): block for block, each in enumerate(all_kept) for trip in each.trips})
    y.sum().backward()
    order = list(dict.fromkeys(told))
    assert order == [("back", 2), ("back", 1), ("used", 2), ("back", 0), ("used", 1), ("used", 0)]


def test_gradients_are_those_of_plain_layers_and_nothing_is_left() -> None:
    layers, kept = [Layer() for _ in range(3)], list[Kept]()
    x = torch.randn(SIZE, SIZE, dtype=torch.float64)
    plain = x
    for layer in layers:
        plain = layer(plain)
    plain.sum().backward()
    expected = [layer.weight.grad for layer in layers]
    for layer in layers:
        layer.weight.grad = None
    all_kept: list[Kept] = []
    chain(layers, x, kept, all_kept).sum().backward()
    assert all(torch.equal(layer.weight.grad, grad) for layer, grad in zip(layers, expected))  # type: ignore[arg-type]
    left = weakref.ref(all_kept[0])
    kept.clear()
    all_kept.clear()
    gc.collect()
    assert left() is None


def test_without_gradients_nothing_is_sent() -> None:
    kept: list[Kept] = []
    with torch.no_grad():
        offloaded(lambda: Layer()(torch.ones(SIZE, SIZE, dtype=torch.float64)), (), kept)
    assert not kept


def test_backward_sees_parameters_where_they_are_then() -> None:
    """Under ZeRO-3 they were in memory that others have used since; views of them are found again, too."""
    memory, x = torch.randn(2, SIZE * SIZE, dtype=torch.float64), torch.randn(4, SIZE, dtype=torch.float64)
    weight = torch.nn.Parameter(memory[0].view(SIZE, SIZE))
    x.requires_grad_()

    def run() -> Tensor:
        return (x @ weight.t() * weight[3]).sum(1) @ weight[:4, 1]

    run().backward()
    assert x.grad is not None
    expected, x.grad = x.grad.clone(), None
    y = offloaded(run, (weight,), [])
    memory[1] = memory[0]
    weight.data = memory[1].view(SIZE, SIZE)
    memory[0] = torch.nan
    y.backward()
    assert x.grad is not None and torch.equal(x.grad, expected)


def test_of_a_real_block_no_weight_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", 0)
    stage = stage_of(TINY, torch.float64, recompute="offload")
    weights = {param.untyped_storage().data_ptr() for param in stage.parameters()}
    gone: list[int] = []
    begin = _Trip.__init__

    def noted(trip: _Trip, tensor: Tensor) -> None:
        gone.append(tensor.untyped_storage().data_ptr())
        begin(trip, tensor)

    monkeypatch.setattr(_Trip, "__init__", noted)
    loss = stage(microbatch(TINY, 0))
    assert isinstance(loss, Loss)
    loss.objective.backward()
    assert len(gone) >= 8 * TINY.num_layers and not weights.intersection(gone)
