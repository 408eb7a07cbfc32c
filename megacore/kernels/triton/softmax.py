"""Masked softmax: one program per row of scores, which are read once and written once."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacore.kernels.triton.launch import NAMESPACE, as_rows, row_block, warps_of, wide


@triton.jit
def _forward(
    scores, mask, out, stride_row, mask_b, mask_n, mask_q, mask_k, heads, queries, keys, scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    query, head, sample = row % queries, (row // queries) % heads, row // (queries * heads)
    key = tl.arange(0, BLOCK)
    visible = key < keys
    if CAUSAL:
        visible = visible & (key <= query + (keys - queries))
    if MASKED:
        place = mask + sample * mask_b + head * mask_n + query * mask_q + key * mask_k
        visible = visible & (tl.load(place, mask=visible, other=0) != 0)
    x = tl.load(scores + row * stride_row + key, mask=visible, other=0).to(WIDE) * scale
    top = tl.max(tl.where(visible, x, float("-inf")), 0)
    weights = tl.where(visible, tl.exp(x - tl.where(top > float("-inf"), top, 0.0)), 0.0)
    total = tl.sum(weights, 0)
    weights = weights / tl.where(total > 0, total, 1.0)  # a row that sees nothing is 0
    tl.store(out + row * keys + key, weights.to(out.dtype.element_ty), mask=key < keys)


@triton.jit
def _backward(grad, out, grad_scores, stride_grad, stride_out, keys, scale, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    key = tl.arange(0, BLOCK)
    inside = key < keys
    g = tl.load(grad + row * stride_grad + key, mask=inside, other=0).to(WIDE)
    p = tl.load(out + row * stride_out + key, mask=inside, other=0).to(WIDE)
    result = p * (g - tl.sum(g * p, 0)) * scale
    tl.store(grad_scores + row * keys + key, result.to(grad_scores.dtype.element_ty), mask=inside)


@torch.library.custom_op(f"{NAMESPACE}::softmax", mutates_args=())
def _softmax(scores: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    rows = as_rows(scores)
    out = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    (_, n, q, k), block = scores.shape, row_block(scores.shape[-1])
    seen = rows if mask is None else mask.expand(scores.shape).view(torch.uint8)
    if scores.numel():
        _forward[(rows.shape[0],)](
            rows, seen, out, rows.stride(0), *(seen.stride() if mask is not None else (0, 0, 0, 0)), n, q, k, scale,
            MASKED=mask is not None, CAUSAL=causal, WIDE=wide(scores.dtype), BLOCK=block, num_warps=warps_of(block),
        )  # fmt: skip
    return out


@_softmax.register_fake
def _(scores: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    return scores.new_empty(scores.shape)


@torch.library.custom_op(f"{NAMESPACE}::softmax_backward", mutates_args=())
def _softmax_backward(grad: Tensor, out: Tensor, scale: float) -> Tensor:
    grads, rows, block = as_rows(grad), as_rows(out), row_block(out.shape[-1])
    grad_scores = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    if out.numel():
        _backward[(rows.shape[0],)](
            grads, rows, grad_scores, grads.stride(0), rows.stride(0), out.shape[-1], scale,
            WIDE=wide(out.dtype), BLOCK=block, num_warps=warps_of(block),
        )  # fmt: skip
    return grad_scores


@_softmax_backward.register_fake
def _(grad: Tensor, out: Tensor, scale: float) -> Tensor:
    return out.new_empty(out.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.scale = inputs[3]
    ctx.save_for_backward(output)


_softmax.register_autograd(
    lambda ctx, grad: (_softmax_backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None), setup_context=_keep
)


def softmax(scores: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """As ``reference.softmax``."""
    return _softmax(scores, mask, causal, scale)
