"""Fused operations in PyTorch: they save less, and pass over memory fewer times, than their reference."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Rope(torch.autograd.Function):
    """A rotation: its backward is the rotation by the opposite angle, so nothing but the angles is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    sizes = (half, half, x.shape[-1] - 2 * half)
    first, second, rest = x.split(sizes, -1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_first, out_second, out_rest = out.split(sizes, -1)
    out_rest.copy_(rest)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As ``reference.rope``."""
    return _Rope.apply(x, cos, sin)


class _Swiglu(torch.autograd.Function):
    """Saves only its input, and computes the sigmoid again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        out = torch.empty_like(x)
        grad_gate, grad_up = out.chunk(2, -1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out


def swiglu(x: Tensor) -> Tensor:
    """As ``reference.swiglu``."""
    return _Swiglu.apply(x)


class _RmsNorm(torch.autograd.Function):
    """Saves its input and one number per row; computes in float32 at least.

    With p = grad * x, both sums of backward are products with p:
    the weight's gradient p^T r, and the row's mean of grad * weight * x, p weight (r = 1 / rms)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        dtype = torch.promote_types(x.dtype, torch.float32)
        inverse = torch.linalg.vector_norm(rows, dim=-1, dtype=dtype).square_().div_(rows.shape[1]).add_(eps).rsqrt_()
        ctx.save_for_backward(rows, weight, inverse)
        ctx.offset = offset
        factor = weight.to(dtype) + offset if offset else weight
        return torch.mul(rows, inverse[:, None]).mul_(factor).to(x.dtype).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weight, inverse = ctx.saved_tensors
        dtype = inverse.dtype
        grad_rows, factor = grad.reshape(rows.shape).to(dtype), weight.to(dtype)
        if ctx.offset:
            factor = factor + ctx.offset
        product = grad_rows * rows
        grad_weight = product.t() @ inverse
        share = (product @ factor).mul_(inverse).mul_(inverse).mul_(inverse).div_(rows.shape[1])
        torch.mul(grad_rows, factor, out=product).mul_(inverse[:, None]).addcmul_(rows, share[:, None], value=-1)
        return product.to(rows.dtype).view(grad.shape), grad_weight.to(weight.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """As ``reference.rms_norm``."""
    return _RmsNorm.apply(x, weight, eps, offset)


def rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """As ``reference.rms_norm_add``."""
    total = x + residual
    return rms_norm(total, weight, eps, offset), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As ``reference.layer_norm``, by torch's own fused operation."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def layer_norm_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As ``reference.layer_norm_add``."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


class _BiasGelu(torch.autograd.Function):
    """Saves the sum only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        total = x + bias
        ctx.save_for_backward(total)
        ctx.of_bias = bias.dtype
        return F.gelu(total, approximate="tanh")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (total,) = ctx.saved_tensors
        grad_x = torch.ops.aten.gelu_backward(grad, total, approximate="tanh")
        wide = torch.promote_types(ctx.of_bias, torch.float32)
        return grad_x, grad_x.flatten(0, -2).sum(0, dtype=wide).to(ctx.of_bias)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """As ``reference.bias_gelu``."""
    return _BiasGelu.apply(x, bias)


class _BiasDropoutAdd(torch.autograd.Function):
    """Saves what is kept only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, residual: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.formats = x.dtype, bias.dtype, residual.dtype
        wide = torch.promote_types(x.dtype, keep.dtype)
        return torch.addcmul(residual.to(wide), x + bias.to(wide), keep.to(wide)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (keep,) = ctx.saved_tensors
        of_x, of_bias, of_residual = ctx.formats
        dropped = grad * keep
        return dropped.to(of_x), dropped.flatten(0, -2).sum(0).to(of_bias), grad.to(of_residual), None


def bias_dropout_add(x: Tensor, bias: Tensor, residual: Tensor, keep: Tensor) -> Tensor:
    """As ``reference.bias_dropout_add``."""
    return _BiasDropoutAdd.apply(x, bias, residual, keep)


def squares(tensors: Sequence[Tensor]) -> Tensor:
    """As ``reference.squares``: summed in float32 at least, many tensors at once."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype)).to(torch.float64).square_()


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, keep: Tensor | None = None
) -> Tensor:
    """As ``reference.attention``, by torch's scaled_dot_product_attention, which has no place for ``keep``."""
    assert keep is None, "dropout masks of our own need the explicit path"
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
