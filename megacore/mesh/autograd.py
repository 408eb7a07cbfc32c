"""Collectives that autograd sees: each one's backward is its conjugate, the transpose of the forward as a linear map.

Tensor and sequence parallelism are nothing but these, put where activations pass from replicated to split and back
(Megatron-LM, arXiv:1909.08053, f and g; Korthikanti et al., arXiv:2205.05198, g and g-bar).

| name                | forward        | backward       | input             | output            |
|---------------------|----------------|----------------|-------------------|-------------------|
| `copy_to`           | identity       | all-reduce     | replicated        | used differently  |
| `reduce_from`       | all-reduce     | identity       | addends           | replicated        |
| `gather_from`       | all-gather     | own slice      | slices            | replicated        |
| `scatter_to`        | own slice      | all-gather     | replicated        | slices            |
| `all_gather_summed` | all-gather     | reduce-scatter | slices            | used differently  |
| `reduce_scatter_to` | reduce-scatter | all-gather     | addends           | slices            |

*Replicated* tensors, and their gradients, are equal on all ranks; what is *used differently* has on each rank the
gradient of that rank's use. `sizes` gives the slices along `dim` where they are not equal. A group of size 1 returns
x itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacore.mesh.collectives import all_gather, all_reduce, reduce_scatter
from megacore.mesh.group import Group

Sizes = Sequence[int] | None


def copy_to(x: Tensor, group: Group) -> Tensor:
    """Any shape to the same; the gradient is summed over the group."""
    return x if group.size == 1 else _CopyTo.apply(x, group)


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """Any shape to the same: the sum over the group, a new tensor."""
    return x if group.size == 1 else _ReduceFrom.apply(x, group)


def gather_from(x: Tensor, group: Group, dim: int = 0, sizes: Sizes = None) -> Tensor:
    """[.., n, ..] to [.., t*n, ..], the same on all ranks and used alike there."""
    return x if group.size == 1 else _GatherFrom.apply(x, group, dim, sizes)


def scatter_to(x: Tensor, group: Group, dim: int = 0, sizes: Sizes = None) -> Tensor:
    """[.., t*n, ..], the same on all ranks, to the rank's own [.., n, ..]."""
    return x if group.size == 1 else _ScatterTo.apply(x, group, dim, sizes)


def all_gather_summed(x: Tensor, group: Group, dim: int = 0, sizes: Sizes = None) -> Tensor:
    """[.., n, ..] to [.., t*n, ..], used differently by each rank."""
    return x if group.size == 1 else _AllGatherSummed.apply(x, group, dim, sizes)


def reduce_scatter_to(x: Tensor, group: Group, dim: int = 0, sizes: Sizes = None) -> Tensor:
    """[.., t*n, ..] to the rank's own [.., n, ..] of the sum over the group."""
    return x if group.size == 1 else _ReduceScatterTo.apply(x, group, dim, sizes)


def own_slice(x: Tensor, group: Group, dim: int = 0, sizes: Sizes = None) -> Tensor:
    """[.., t*n, ..] to a view [.., n, ..] of the rank's own slice."""
    if sizes is None:
        size = x.shape[dim] // group.size
        if size * group.size != x.shape[dim]:
            raise ValueError(
                f"{tuple(x.shape)} does not fall into {group.size} equal slices along dim {dim}; give the sizes"
            )
        return x.narrow(dim, group.rank * size, size)
    return x.narrow(dim, sum(sizes[: group.rank]), sizes[group.rank])


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        # A copy: autograd may hand the same gradient tensor to other users.
        return all_reduce(grad.clone(memory_format=torch.contiguous_format), ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, sizes: Sizes) -> Tensor:
        ctx.group, ctx.dim = group, dim
        ctx.sizes = [x.shape[dim]] * group.size if sizes is None else sizes
        return all_gather(x, group, dim, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return own_slice(grad, ctx.group, ctx.dim, ctx.sizes), None, None, None


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, sizes: Sizes) -> Tensor:
        ctx.group, ctx.dim, ctx.sizes = group, dim, sizes
        return own_slice(x, group, dim, sizes).clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_gather(grad, ctx.group, ctx.dim, ctx.sizes), None, None, None


class _AllGatherSummed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, sizes: Sizes) -> Tensor:
        ctx.group, ctx.dim, ctx.sizes = group, dim, sizes
        return all_gather(x, group, dim, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return reduce_scatter(grad, ctx.group, ctx.dim, ctx.sizes), None, None, None


class _ReduceScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, sizes: Sizes) -> Tensor:
        ctx.group, ctx.dim, ctx.sizes = group, dim, sizes
        return reduce_scatter(x, group, dim, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_gather(grad, ctx.group, ctx.dim, ctx.sizes), None, None, None
