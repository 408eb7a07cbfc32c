"""Sums of squares of many tensors, for gradients' norm: parts in float32, added up in float64 in a fixed order."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacore.kernels.triton.launch import NAMESPACE

BLOCK = 1024
BLOCKS = 16
"""Of each program; a part is a sum of BLOCK x BLOCKS squares, tree by tree."""


@triton.jit
def _sum_squares(x, parts, numel, WIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), WIDE)
    for block in range(BLOCKS):
        place = (program * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + place, mask=place < numel, other=0).to(WIDE)
        total += value * value
    tl.store(parts + program, tl.sum(total.to(tl.float64), 0))


@torch.library.custom_op(f"{NAMESPACE}::squares", mutates_args=())
def _squares(tensors: Sequence[Tensor]) -> Tensor:
    counts = [triton.cdiv(tensor.numel(), BLOCK * BLOCKS) for tensor in tensors]
    device = tensors[0].device if tensors else None
    parts = torch.empty(sum(counts), dtype=torch.float64, device=device)
    start = 0
    for tensor, count in zip(tensors, counts):
        if count:
            kind = tl.float64 if tensor.dtype == torch.float64 else tl.float32
            flat = tensor.contiguous()
            _sum_squares[(count,)](flat, parts[start:], tensor.numel(), WIDE=kind, BLOCK=BLOCK, BLOCKS=BLOCKS)
        start += count
    lengths = torch.tensor(counts, dtype=torch.long, device=device)
    return torch.segment_reduce(parts, "sum", lengths=lengths, initial=0.0)


@_squares.register_fake
def _(tensors: Sequence[Tensor]) -> Tensor:
    like = tensors[0] if tensors else torch.empty(0)
    return like.new_empty(len(tensors), dtype=torch.float64)


def squares(tensors: Sequence[Tensor]) -> Tensor:
    """As ``reference.squares``. A launch per tensor: gradients that lie in one buffer are one tensor."""
    return _squares(tensors)
