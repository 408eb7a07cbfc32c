"""What vocab-parallel cross-entropy wants to know of a chunk of logits (see ``reference.logit_statistics``), in two
passes over each row: one that finds the largest logit, and one that exponentiates and sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacore.kernels.triton.launch import NAMESPACE, as_rows, wide, wide_of

BLOCK = 4096
"""Logits that a program holds at once; rows may be longer."""


@triton.jit
def _statistics(logits, target, own_max, sums, exp, stride, width, num_rows, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """sums [3, rows]: of exp(logit - own max), the target's logit (0 if it is elsewhere), of logits."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.full((BLOCK,), float("-inf"), WIDE)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        top = tl.maximum(top, tl.load(logits + row * stride + columns, mask=inside, other=float("-inf")).to(WIDE))
    largest = tl.max(top, 0)
    total = tl.zeros((BLOCK,), WIDE)
    plain = tl.zeros((BLOCK,), WIDE)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        x = tl.load(logits + row * stride + columns, mask=inside, other=0).to(WIDE)
        weight = tl.where(inside, tl.exp(x - largest), 0.0)
        tl.store(exp + row * width + columns, weight.to(exp.dtype.element_ty), mask=inside)
        total += weight
        plain += x
    wanted = tl.load(target + row)
    here = (wanted >= 0) & (wanted < width)
    hit = tl.load(logits + row * stride + tl.where(here, wanted, 0), mask=here, other=0).to(WIDE)
    tl.store(own_max + row, largest)
    tl.store(sums + row, tl.sum(total, 0))
    tl.store(sums + num_rows + row, hit)
    tl.store(sums + 2 * num_rows + row, tl.sum(plain, 0))


@torch.library.custom_op(f"{NAMESPACE}::logit_statistics", mutates_args=())
def _logit_statistics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (num_rows, width), dtype = logits.shape, wide_of(logits.dtype)
    exp = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    own_max = torch.full((num_rows,), -torch.inf, dtype=dtype, device=logits.device)
    sums = torch.zeros(3, num_rows, dtype=dtype, device=logits.device)
    if logits.numel():
        rows = as_rows(logits)
        _statistics[(num_rows,)](
            rows, target.contiguous(), own_max, sums, exp, rows.stride(0), width, num_rows,
            WIDE=wide(logits.dtype), BLOCK=min(BLOCK, triton.next_power_of_2(width)),
        )  # fmt: skip
    return own_max, sums, exp


@_logit_statistics.register_fake
def _(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype, rows = wide_of(logits.dtype), logits.shape[0]
    return logits.new_empty(rows, dtype=dtype), logits.new_empty((3, rows), dtype=dtype), logits.new_empty(logits.shape)


def logit_statistics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.logit_statistics``."""
    return _logit_statistics(logits, target)
