"""What mixtures of experts are made of, faster than in ``reference``: rows to experts and back, one product for each.

Rows are moved by gathers alone, backward too, so that sums have an order.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacore.kernels import reference

ALIGNED = 16
"""Bytes: of these, rows of what ``grouped_mm`` takes must be multiples."""


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, num_choices: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.num_choices = num_choices
        return x[order // num_choices]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        own = grad[reference.inverse_of(order)].unflatten(0, (-1, ctx.num_choices))
        return own.sum(1, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype), None, None


def permute(x: Tensor, choice: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.permute``."""
    order, counts = reference.order_of(choice, num_experts)
    return _Permute.apply(x, order, choice.shape[1]), order, counts


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, order, weight)
        return reference.unpermute(rows, order, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        rows, order, weight = ctx.saved_tensors
        at = grad[order // weight.shape[1]]
        wide = torch.promote_types(rows.dtype, torch.float32)
        dots = torch.linalg.vecdot(at.to(wide), rows.to(wide))[reference.inverse_of(order)]
        return (at * weight.flatten()[order, None]).to(rows.dtype), None, dots.view(weight.shape).to(weight.dtype)


def unpermute(rows: Tensor, order: Tensor, weight: Tensor) -> Tensor:
    """As ``reference.unpermute``."""
    return _Unpermute.apply(rows, order, weight)


def _aligned(x: Tensor) -> Tensor:
    """Row-major, with zeros behind rows up to a multiple of ``ALIGNED`` bytes."""
    return F.pad(x, (0, -x.shape[-1] % (ALIGNED // x.element_size()))).contiguous()


@torch.library.custom_op("megacore::grouped_product", mutates_args=())
def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [n, i], weight [e, o, i], ends [e], int32 -> [n, o]."""
    if not x.numel() or not weight.numel():
        return x.new_zeros(len(x), weight.shape[1])
    weight_eio = _aligned(weight.mT)
    rows = F.pad(x, (0, -x.shape[1] % (ALIGNED // x.element_size()))).contiguous()
    weight_eio = F.pad(weight_eio, (0, 0, 0, rows.shape[1] - weight_eio.shape[1]))
    return F.grouped_mm(rows, weight_eio, offs=ends)[:, : weight.shape[1]].contiguous()


@_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(x), weight.shape[1])


@torch.library.custom_op("megacore::grouped_weights", mutates_args=())
def _of_weights(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The weights' gradients [e, o, i] of grad [n, o] and x [n, i]."""
    if not grad.numel() or not x.numel():
        return x.new_zeros(len(ends), grad.shape[1], x.shape[1])
    made = F.grouped_mm(_aligned(grad).t(), _aligned(x), offs=ends)
    return made[:, : grad.shape[1], : x.shape[1]].contiguous()


@_of_weights.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(ends), grad.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, ends = ctx.saved_tensors
    return _product(grad, weight.mT, ends), _of_weights(grad, x, ends), None


_product.register_autograd(_backward, setup_context=_keep)


def grouped_product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """As ``reference.grouped_product``, by torch's grouped_mm."""
    return _product(x, weight, counts.cumsum(0, dtype=torch.int32))


def grouped_refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why torch's grouped product cannot serve, or ''."""
    if not hasattr(F, "grouped_mm"):
        return "this torch has no grouped_mm; 2.10 has"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"made for 16 and 32 bits, not {dtype}"
    if device.type == "cuda" and dtype != torch.bfloat16:
        return f"on CUDA made for bfloat16, not {dtype}"
    return ""
