"""Rotary positions, into new memory or in place. Backward is the rotation by the opposite angle."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacore.kernels.triton.launch import NAMESPACE, row_block, wide


@triton.jit
def _rotate(
    x, cos, sin, out, stride_b, stride_s, stride_n, stride_d, out_b, out_s, out_n, out_d,
    angle_b, angle_s, seq, heads, pairs, size,
    APART: tl.constexpr, BACK: tl.constexpr, COPIES: tl.constexpr, WIDE: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """A program turns one head of one token. Pairs are (2i, 2i + 1) or, with APART, (i, i + pairs)."""
    program = tl.program_id(0).to(tl.int64)
    n, token = program % heads, program // heads
    s, b = token % seq, token // seq
    pair = tl.arange(0, PAIRS)
    inside = pair < pairs
    if APART:
        one, other = pair, pair + pairs
    else:
        one, other = 2 * pair, 2 * pair + 1
    source = x + b * stride_b + s * stride_s + n * stride_n
    target = out + b * out_b + s * out_s + n * out_n
    first = tl.load(source + one * stride_d, mask=inside, other=0).to(WIDE)
    second = tl.load(source + other * stride_d, mask=inside, other=0).to(WIDE)
    angle = b * angle_b + s * angle_s + pair
    c = tl.load(cos + angle, mask=inside, other=0).to(WIDE)
    d = tl.load(sin + angle, mask=inside, other=0).to(WIDE)
    if BACK:
        d = -d
    kind = out.dtype.element_ty
    tl.store(target + one * out_d, (first * c - second * d).to(kind), mask=inside)
    tl.store(target + other * out_d, (second * c + first * d).to(kind), mask=inside)
    if COPIES:
        rest = 2 * pairs + tl.arange(0, REST)
        tl.store(target + rest * out_d, tl.load(source + rest * stride_d, mask=rest < size, other=0), mask=rest < size)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, apart: bool, back: bool) -> None:
    (b, s, n, size), pairs = x.shape, cos.shape[-1]
    if not x.numel():
        return
    cos, sin = cos.contiguous(), sin.contiguous()
    rest = size - 2 * pairs
    _rotate[(b * s * n,)](
        x, cos, sin, out, *x.stride(), *out.stride(), cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
        s, n, pairs, size,
        APART=apart, BACK=back, COPIES=rest > 0 and out.data_ptr() != x.data_ptr(), WIDE=wide(x.dtype),
        PAIRS=row_block(pairs), REST=row_block(rest), num_warps=1,
    )  # fmt: skip


@torch.library.custom_op(f"{NAMESPACE}::rope", mutates_args=())
def _rope(x: Tensor, cos: Tensor, sin: Tensor, apart: bool, back: bool) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, cos, sin, out, apart, back)
    return out


@_rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, apart: bool, back: bool) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.apart, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Angles have no gradient."""
    return _rope(grad, *ctx.saved_tensors, ctx.apart, not ctx.back), None, None, None, None


_rope.register_autograd(_gradients, setup_context=_keep)


@torch.library.custom_op(f"{NAMESPACE}::rope_", mutates_args=("x",))
def _rope_in_place(x: Tensor, cos: Tensor, sin: Tensor, apart: bool, back: bool) -> None:
    _launch(x, cos, sin, x, apart, back)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As ``reference.rope``."""
    return _rope(x, cos, sin, True, False)


def rope_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As ``reference.rope_interleaved``."""
    return _rope(x, cos, sin, False, False)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, back: bool = False) -> Tensor:
    """Turn ``x``, of any strides, where it lies; ``back`` by the opposite angles. No gradient goes through this."""
    _rope_in_place(x, cos, sin, not interleaved, back)
    return x
