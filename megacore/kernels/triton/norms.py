"""RMSNorm, alone or with the sum before it, and LayerNorm (definitions: ``reference``).

With r = 1 / rms, n = x r the normalised row, w the factor and g the gradient of y = n w:

    RMSNorm    dx = r (g w - n mean(g w n))                    dw = sum over rows of g n
    LayerNorm  dx = r (g w - mean(g w) - n mean(g w n))        dw as before, db = sum over rows of g

A program takes a run of rows. Its share of dw and db is a row of a small matrix, which torch sums: no atomics, so the
same bits in every run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacore.kernels.triton.launch import NAMESPACE, as_rows, row_block, warps_of, wide, wide_of

PROGRAMS = 256
"""At most so many take the rows of a backward."""


@triton.jit
def _forward(
    x, residual, weight, bias, y, total, mean, inverse, stride_x, stride_residual, width,
    EPS: tl.constexpr, OFFSET: tl.constexpr, CENTRED: tl.constexpr, ADDS: tl.constexpr, BIASED: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * stride_x + columns, mask=inside, other=0)
    if ADDS:
        values = values.to(WIDE) + tl.load(residual + row * stride_residual + columns, mask=inside, other=0).to(WIDE)
        values = values.to(total.dtype.element_ty)
        tl.store(total + row * width + columns, values, mask=inside)
    wide_values = values.to(WIDE)
    if CENTRED:
        centre = tl.sum(wide_values, 0) / width
        wide_values = tl.where(inside, wide_values - centre, 0.0)
        tl.store(mean + row, centre)
    r = 1 / tl.sqrt(tl.sum(wide_values * wide_values, 0) / width + EPS)
    tl.store(inverse + row, r)
    out = wide_values * r * (tl.load(weight + columns, mask=inside, other=0).to(WIDE) + OFFSET)
    if BIASED:
        out += tl.load(bias + columns, mask=inside, other=0).to(WIDE)
    tl.store(y + row * width + columns, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, grad_total, x, weight, mean, inverse, grad_x, parts_weight, parts_bias,
    stride_grad, stride_total, stride_x, width, num_rows, rows_each,
    OFFSET: tl.constexpr, CENTRED: tl.constexpr, ADDS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    factor = tl.where(inside, tl.load(weight + columns, mask=inside, other=0).to(WIDE) + OFFSET, 0.0)
    sum_weight = tl.zeros((BLOCK,), WIDE)
    sum_bias = tl.zeros((BLOCK,), WIDE)
    first = program * rows_each
    for row in range(first, tl.minimum(first + rows_each, num_rows)):
        g = tl.load(grad + row * stride_grad + columns, mask=inside, other=0).to(WIDE)
        n = tl.load(x + row * stride_x + columns, mask=inside, other=0).to(WIDE)
        r = tl.load(inverse + row)
        if CENTRED:
            n = tl.where(inside, n - tl.load(mean + row), 0.0)
        n *= r
        sum_weight += g * n
        scaled = g * factor
        out = scaled - n * (tl.sum(scaled * n, 0) / width)
        if CENTRED:
            sum_bias += g
            out -= tl.sum(scaled, 0) / width
        out *= r
        if ADDS:
            out += tl.load(grad_total + row * stride_total + columns, mask=inside, other=0).to(WIDE)
        tl.store(grad_x + row * width + columns, out.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(parts_weight + program * width + columns, sum_weight, mask=inside)
    if CENTRED:
        tl.store(parts_bias + program * width + columns, sum_bias, mask=inside)


def _normalise(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, offset: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, x + residual, mean and inverse of each row; what is not asked for is empty."""
    rows = as_rows(x)
    (num_rows, width), dtype = rows.shape, wide_of(x.dtype)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape if residual is not None else 0, dtype=x.dtype, device=x.device)
    inverse = torch.empty(num_rows, dtype=dtype, device=x.device)
    mean = torch.empty(num_rows if centred else 0, dtype=dtype, device=x.device)
    added = rows if residual is None else as_rows(residual)
    block = row_block(width)
    if rows.numel():
        _forward[(num_rows,)](
            rows, added, weight.contiguous(), weight if bias is None else bias.contiguous(), y, total, mean, inverse,
            rows.stride(0), added.stride(0), width,
            EPS=eps, OFFSET=offset, CENTRED=centred, ADDS=residual is not None, BIASED=bias is not None,
            WIDE=wide(x.dtype), BLOCK=block, num_warps=warps_of(block),
        )  # fmt: skip
    return y, total, mean, inverse


def _gradients(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, of the weight and, where there are means, of the bias."""
    rows, grads = as_rows(x), as_rows(grad)
    totals = grads if grad_total is None else as_rows(grad_total)
    (num_rows, width), centred = rows.shape, bool(mean.numel())
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows_each = max(1, -(-num_rows // PROGRAMS))
    programs = -(-num_rows // rows_each) if width else 0
    parts = [torch.empty(programs, width, dtype=inverse.dtype, device=x.device) for _ in range(1 + centred)]
    block = row_block(width)
    if programs:
        _backward[(programs,)](
            grads, totals, rows, weight.contiguous(), mean, inverse, grad_x, parts[0], parts[-1],
            grads.stride(0), totals.stride(0), rows.stride(0), width, num_rows, rows_each,
            OFFSET=offset, CENTRED=centred, ADDS=grad_total is not None, WIDE=wide(x.dtype), BLOCK=block,
            num_warps=warps_of(block),
        )  # fmt: skip
    sums = [part.sum(0).to(weight.dtype) for part in parts]
    return grad_x, sums[0], sums[1] if centred else weight.new_empty(0)


def _fake_rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1].numel(), dtype=wide_of(x.dtype))


@torch.library.custom_op(f"{NAMESPACE}::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    y, _, _, inverse = _normalise(x, None, weight, None, eps, offset, False)
    return y, inverse


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _fake_rows(x)


@torch.library.custom_op(f"{NAMESPACE}::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight, _ = _gradients(grad, grad_total, x, weight, inverse.new_empty(0), inverse, offset)
    return grad_x, grad_weight


@_rms_norm_backward.register_fake
def _(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, ctx.offset = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _rms_norm_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, inverse = ctx.saved_tensors
    return *_rms_norm_backward(grad, None, x, weight, inverse, ctx.offset), None, None


_rms_norm.register_autograd(_rms_norm_gradients, setup_context=_keep_rms_norm)


@torch.library.custom_op(f"{NAMESPACE}::rms_norm_add", mutates_args=())
def _rms_norm_add(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, _, inverse = _normalise(x, residual, weight, None, eps, offset, False)
    return y, total, inverse


@_rms_norm_add.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), _fake_rows(x)


def _keep_rms_norm_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _, ctx.offset = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[1], weight, output[2])


def _rms_norm_add_gradients(ctx: Any, grad: Tensor, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    total, weight, inverse = ctx.saved_tensors
    grad_x, grad_weight = _rms_norm_backward(grad, grad_total, total, weight, inverse, ctx.offset)
    return grad_x, grad_x, grad_weight, None, None


_rms_norm_add.register_autograd(_rms_norm_add_gradients, setup_context=_keep_rms_norm_add)


@torch.library.custom_op(f"{NAMESPACE}::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, inverse = _normalise(x, None, weight, bias, eps, 0.0, True)
    return y, mean, inverse


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), _fake_rows(x), _fake_rows(x)


@torch.library.custom_op(f"{NAMESPACE}::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if not mean.numel():  # no row: nothing to sum
        return torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(weight)
    return _gradients(grad, None, x, weight, mean, inverse, 0.0)


@_layer_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _keep_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(inputs[0], inputs[1], *output[1:])


def _layer_norm_gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *_layer_norm_backward(grad, *ctx.saved_tensors), None


_layer_norm.register_autograd(_layer_norm_gradients, setup_context=_keep_layer_norm)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """As ``reference.rms_norm``."""
    return _rms_norm(x, weight, eps, offset)[0]


def rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """As ``reference.rms_norm_add``."""
    return _rms_norm_add(x, residual, weight, eps, offset)[:2]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As ``reference.layer_norm``."""
    return _layer_norm(x, weight, bias, eps)[0]
