"""RMSNorm, SwiGLU, attention and the statistics of logits by csrc/cpu: each row passes through memory once.

Sums have a fixed order: neither threads nor instruction sets change a bit. Computed in float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacore.kernels import fused, native

BLOCK = 32
"""As in csrc/cpu/ops.cpp: rows whose share of a weight's gradient is summed by itself."""


class _RmsNorm(torch.autograd.Function):
    """Saves its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        rows, factor = x.contiguous(), weight.contiguous()
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        inverse = torch.empty(x.shape[:-1].numel(), dtype=torch.float32, device=x.device)
        torch.ops.megacore_cpu.rms_norm_(rows, factor, y, inverse, eps, offset, "")
        ctx.save_for_backward(rows, factor, inverse)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weight, inverse = ctx.saved_tensors
        grad_x = torch.empty_like(rows)
        parts = inverse.new_zeros(-(-inverse.numel() // BLOCK), weight.numel())
        own = (grad.contiguous(), rows, weight, inverse, grad_x, parts)
        torch.ops.megacore_cpu.rms_norm_backward_(*own, ctx.offset, "")
        return grad_x, parts.sum(0).to(weight.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """As ``reference.rms_norm``."""
    return _RmsNorm.apply(x, weight, eps, offset)


class _Swiglu(torch.autograd.Function):
    """Saves only its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows, width = x.contiguous(), x.shape[-1] // 2
        ctx.save_for_backward(rows)
        y = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
        torch.ops.megacore_cpu.swiglu_(rows, None, y, width, "")
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        grad_x = torch.empty_like(rows)
        torch.ops.megacore_cpu.swiglu_(rows, grad.contiguous(), grad_x, grad.shape[-1], "")
        return grad_x


def swiglu(x: Tensor) -> Tensor:
    """As ``reference.swiglu``."""
    return _Swiglu.apply(x)


def rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """As ``reference.rms_norm_add``."""
    total = x + residual
    return rms_norm(total, weight, eps, offset), total


@torch.no_grad()
def logit_statistics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.logit_statistics``; an exponential below e^-87.3 is e^-87.3."""
    rows = logits.contiguous()
    largest = torch.full(rows.shape[:1], -torch.inf, dtype=torch.float32, device=rows.device)
    sums, exp = largest.new_zeros(3, len(rows)), torch.empty_like(rows)
    if rows.numel():
        torch.ops.megacore_cpu.logit_statistics_(rows, target.contiguous(), largest, sums, exp, "")
    return largest, sums, exp


class _Attention(torch.autograd.Function):
    """Saves its inputs, its output and one number per query and head, as torch's own attention."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        own = tuple(_by_token(each) for each in (q, k, v))
        y = torch.empty(own[0].shape, dtype=q.dtype, device=q.device)
        sums = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        torch.ops.megacore_cpu.attention_(*own, y, sums, scale, None, None, None, None)
        out = y.transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, sums = ctx.saved_tensors
        own = tuple(_by_token(each) for each in (q, k, v))
        grads = tuple(torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in own)
        y = out.transpose(1, 2)
        torch.ops.megacore_cpu.attention_(*own, y, sums, ctx.scale, _by_token(grad), *grads)
        of_q, of_k, of_v = (each.transpose(1, 2) for each in grads)
        return of_q, of_k, of_v, None


def _by_token(x: Tensor) -> Tensor:
    """[b, n, s, d] to [b, s, n, d] whose dims lie together."""
    turned = x.transpose(1, 2)
    return turned if turned.stride(3) == 1 else turned.contiguous()


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, keep: Tensor | None = None
) -> Tensor:
    """As ``reference.attention``. What is not plainly causal, and heads of an odd size, are torch's."""
    if mask is not None or not causal or q.shape[-1] % 2 or q.shape != (*k.shape[:1], q.shape[1], *k.shape[2:]):
        return fused.attention(q, k, v, mask, causal, scale, keep)
    assert keep is None, "dropout masks of our own need the explicit path"
    return _Attention.apply(q, k, v, scale)


def attention_refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why csrc/cpu's attention cannot serve, or ''."""
    if reason := refuses(device, dtype):
        return reason
    if not torch.ops.megacore_cpu.wgrad_supported(dtype == torch.bfloat16):
        return "this processor has no " + ("AVX-512 dot products of bfloat16" if dtype.itemsize == 2 else "AVX-512")
    return ""


def refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why csrc/cpu cannot serve, or ''."""
    if device.type != "cpu":
        return f"it is for the CPU, not {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"made for float32 and bfloat16, not {dtype}"
    return native.unavailable()
