"""Activations between the two matrices of an MLP: SwiGLU, GeGLU, and GELU of a sum with a bias.

Backward computes the activation again from the input, so nothing else is kept. GELU is in its tanh form, as
u s with s = sigmoid(2 z), z = sqrt(2 / pi) (u + 0.044715 u^3), since 1 + tanh(z) = 2 sigmoid(2 z).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacore.kernels.triton.launch import NAMESPACE, as_rows, wide, wide_of

BLOCK = 1024
"""Elements of a row that a program takes."""

SILU, GELU = "silu", "gelu"


@triton.jit
def _activation(u, ACT: tl.constexpr):
    """The activation and its slope."""
    if ACT == "silu":
        s = 1 / (1 + tl.exp(-u))
        value = u * s
        slope = s * (1 + u * (1 - s))
    else:
        scale: tl.constexpr = 1.5957691216057308  # 2 sqrt(2 / pi)
        cubic: tl.constexpr = 0.044715
        s = 1 / (1 + tl.exp(-scale * u * (1 + cubic * u * u)))
        value = u * s
        slope = s + value * (1 - s) * scale * (1 + 3 * cubic * u * u)
    return value, slope


@triton.jit
def _gated_forward(x, y, stride_x, width, ACT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(x + row * stride_x + columns, mask=inside, other=0).to(WIDE)
    up = tl.load(x + row * stride_x + width + columns, mask=inside, other=0).to(WIDE)
    value, _ = _activation(gate, ACT)
    tl.store(y + row * width + columns, (value * up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(
    grad, x, grad_x, stride_grad, stride_x, width, ACT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    g = tl.load(grad + row * stride_grad + columns, mask=inside, other=0).to(WIDE)
    gate = tl.load(x + row * stride_x + columns, mask=inside, other=0).to(WIDE)
    up = tl.load(x + row * stride_x + width + columns, mask=inside, other=0).to(WIDE)
    value, slope = _activation(gate, ACT)
    out = grad_x + row * 2 * width + columns
    tl.store(out, (g * up * slope).to(grad_x.dtype.element_ty), mask=inside)
    tl.store(out + width, (g * value).to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def _biased(
    x, bias, grad, out, stride_x, stride_grad, width, SLOPE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """gelu(x + bias) or, with SLOPE, grad times its slope."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    u = tl.load(x + row * stride_x + columns, mask=inside, other=0).to(WIDE)
    u += tl.load(bias + columns, mask=inside, other=0).to(WIDE)
    value, slope = _activation(u, "gelu")
    if SLOPE:
        value = slope * tl.load(grad + row * stride_grad + columns, mask=inside, other=0).to(WIDE)
    tl.store(out + row * width + columns, value.to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op(f"{NAMESPACE}::gated", mutates_args=())
def _gated(x: Tensor, act: str) -> Tensor:
    rows, width = as_rows(x), x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    if y.numel():
        grid = (rows.shape[0], triton.cdiv(width, BLOCK))
        _gated_forward[grid](rows, y, rows.stride(0), width, ACT=act, WIDE=wide(x.dtype), BLOCK=BLOCK)
    return y


@_gated.register_fake
def _(x: Tensor, act: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.custom_op(f"{NAMESPACE}::gated_backward", mutates_args=())
def _gated_gradient(grad: Tensor, x: Tensor, act: str) -> Tensor:
    rows, grads, width = as_rows(x), as_rows(grad), x.shape[-1] // 2
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if grad.numel():
        _gated_backward[(rows.shape[0], triton.cdiv(width, BLOCK))](
            grads, rows, grad_x, grads.stride(0), rows.stride(0), width, ACT=act, WIDE=wide(x.dtype), BLOCK=BLOCK
        )
    return grad_x


@_gated_gradient.register_fake
def _(grad: Tensor, x: Tensor, act: str) -> Tensor:
    return x.new_empty(x.shape)


def _keep_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.act = inputs
    ctx.save_for_backward(x)


_gated.register_autograd(
    lambda ctx, grad: (_gated_gradient(grad, *ctx.saved_tensors, ctx.act), None), setup_context=_keep_gated
)


@torch.library.custom_op(f"{NAMESPACE}::bias_gelu", mutates_args=())
def _bias_gelu(x: Tensor, bias: Tensor, grad: Tensor | None) -> Tensor:
    rows, width = as_rows(x), x.shape[-1]
    grads = rows if grad is None else as_rows(grad)
    out = torch.empty(x.shape, dtype=x.dtype if grad is None else wide_of(x.dtype), device=x.device)
    if x.numel():
        _biased[(rows.shape[0], triton.cdiv(width, BLOCK))](
            rows, bias.contiguous(), grads, out, rows.stride(0), grads.stride(0), width,
            SLOPE=grad is not None, WIDE=wide(x.dtype), BLOCK=BLOCK,
        )  # fmt: skip
    return out


@_bias_gelu.register_fake
def _(x: Tensor, bias: Tensor, grad: Tensor | None) -> Tensor:
    return x.new_empty(x.shape, dtype=x.dtype if grad is None else wide_of(x.dtype))


def _keep_bias_gelu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _bias_gelu_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    slopes = _bias_gelu(x, bias, grad)  # unrounded: its sum is the bias's gradient
    return slopes.to(x.dtype), slopes.reshape(-1, x.shape[-1]).sum(0).to(bias.dtype), None


_bias_gelu.register_autograd(_bias_gelu_gradients, setup_context=_keep_bias_gelu)


def swiglu(x: Tensor) -> Tensor:
    """As ``reference.swiglu``."""
    return _gated(x, SILU)


def geglu(x: Tensor) -> Tensor:
    """As ``reference.geglu``."""
    return _gated(x, GELU)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """As ``reference.bias_gelu``."""
    return _bias_gelu(x, bias, None)
