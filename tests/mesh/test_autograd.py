"""Each pair's backward against finite differences of its forward, over the ranks' inputs taken together, in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megacore.layout.layout import Layout
from megacore.mesh import autograd
from megacore.mesh.autograd import Sizes
from megacore.mesh.group import Group
from megacore.mesh.mesh import ParallelMesh
from tests.pool import WorkerPool


@dataclass(frozen=True)
class Pair:
    """What the forward takes and gives: replicated tensors are one variable, however many ranks hold it."""

    takes_replicated: bool
    gives_replicated: bool
    takes_slices: bool
    has_dim: bool = True


PAIRS = {
    "copy_to": Pair(takes_replicated=True, gives_replicated=False, takes_slices=False, has_dim=False),
    "reduce_from": Pair(takes_replicated=False, gives_replicated=True, takes_slices=False, has_dim=False),
    "gather_from": Pair(takes_replicated=False, gives_replicated=True, takes_slices=True),
    "scatter_to": Pair(takes_replicated=True, gives_replicated=False, takes_slices=False),
    "all_gather_summed": Pair(takes_replicated=False, gives_replicated=False, takes_slices=True),
    "reduce_scatter_to": Pair(takes_replicated=False, gives_replicated=False, takes_slices=False),
}


def draw(seed: int, shape: list[int] | torch.Size) -> Tensor:
    return torch.randn(list(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slope(name: str, group: Group, dim: int, sizes: Sizes) -> float:
    """Largest difference between analytic and numeric derivatives along directions of this rank's input."""
    pair = PAIRS[name]
    function: Callable[..., Tensor] = getattr(autograd, name)
    extra = (dim, sizes) if pair.has_dim else ()
    shape = [2, 3]
    shape[dim] = group.size * 2 if sizes is None else sum(sizes)
    if pair.takes_slices:
        shape[dim] = 2 if sizes is None else sizes[group.rank]
    x = draw(0 if pair.takes_replicated else 1 + group.rank, shape)

    def local_loss(value: Tensor) -> Tensor:
        # Strided input, and non-linear with weights of its own on each rank, unless all ranks compute the same.
        y = function(value.t().contiguous().t(), group, *extra)
        weight = draw(50 if pair.gives_replicated else 50 + group.rank, y.shape)
        return (weight * y.sin()).sum()

    def global_loss(value: Tensor) -> float:
        """One loss of a replicated result; of different results the sum."""
        with torch.no_grad():
            losses = autograd.all_gather(local_loss(value).view(1), group)
        return losses[0].item() if pair.gives_replicated else losses.sum().item()

    variable = x.clone().requires_grad_()
    (analytic,) = torch.autograd.grad(local_loss(variable), variable)
    step, worst = 1e-6, 0.0
    # All ranks move each variable in turn, in random directions; a replicated one moves everywhere at once.
    for owner in [None] if pair.takes_replicated else range(group.size):
        for seed in range(100, 103):
            direction = draw(seed, x.shape) if owner in (None, group.rank) else torch.zeros_like(x)
            difference = (global_loss(x + step * direction) - global_loss(x - step * direction)) / (2 * step)
            if owner in (None, group.rank):
                worst = max(worst, abs(difference - (analytic * direction).sum().item()))
    return worst


def all_slopes(rank: int, size: int) -> dict[str, float]:
    group = ParallelMesh.build(Layout(tp=size), rank, torch.device("cpu")).tp
    ragged = [1 + r for r in range(size)]
    return {
        f"{name} dim={dim} sizes={sizes}": slope(name, group, dim, sizes)
        for name in PAIRS
        for dim in ((0, 1) if PAIRS[name].has_dim else (0,))
        for sizes in ((None, ragged) if PAIRS[name].has_dim else (None,))
    }


@pytest.mark.parametrize("size", [2, 3])
def test_backward_is_the_conjugate_of_forward(pool: WorkerPool, size: int) -> None:
    for rank, slopes in enumerate(pool.run(all_slopes, size, size)):
        assert len(slopes) == 18
        assert {name: error for name, error in slopes.items() if error > 1e-7} == {}, f"rank {rank}"


def leave_gradients_alone(rank: int, size: int) -> None:
    group = ParallelMesh.build(Layout(tp=size), rank, torch.device("cpu")).tp
    x = draw(rank, [3]).requires_grad_()
    given = draw(7, [3])
    kept = given.clone()
    autograd.copy_to(x, group).backward(given)
    assert torch.equal(given, kept), "backward must not write into the gradient that it is given"
    before = x.detach().clone()
    autograd.reduce_from(x, group)
    assert torch.equal(x, before)


def test_inputs_are_not_written(pool: WorkerPool) -> None:
    pool.run(leave_gradients_alone, 2, 2)
