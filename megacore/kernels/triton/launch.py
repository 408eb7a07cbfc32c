"""What launching kernels over rows has in common."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NAMESPACE = "megacore_triton"

WIDEST_ROW = 1 << 16
"""Elements of a row that one program holds at once."""


def as_rows(x: Tensor) -> Tensor:
    """[..., h] as [rows, h] whose elements lie one behind the other; a view where that can be."""
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(x.shape[:-1].numel(), 0)
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def wide(dtype: torch.dtype) -> Any:
    """Triton's name of the format that is computed in: float32 at least."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """The same for torch."""
    return torch.promote_types(dtype, torch.float32)


def row_block(width: int) -> int:
    """The power of two that holds a row. Raises ValueError for rows that a program cannot hold."""
    if width > WIDEST_ROW:
        raise ValueError(
            f"triton: rows of {width} elements; one program holds at most {WIDEST_ROW}: name another backend"
        )
    return max(1, triton.next_power_of_2(width))


def warps_of(block: int) -> int:
    """Warps for a program with so many elements: 4 to 32, some 16 elements for each thread."""
    return min(32, max(4, block // 512))
