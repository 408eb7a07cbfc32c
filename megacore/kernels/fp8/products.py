"""Products of matrices in FP8, and which of them a run takes.

a [m, k] and b [n, k], both row-major, give a b^T [m, n]: b^T is then column-major, as tensor cores want it. They also
want k and n to be multiples of 16; a CPU does not, but is held to it, so what runs here runs there.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from megacore.kernels.fp8.formats import E4M3, E5M2, PER_TENSOR, ROW_BLOCK, SQUARE_BLOCK, Scaled
from megacore.kernels.table import Choice, Kernel, first_willing

MULTIPLE = 16

Product = Callable[[Scaled, Scaled, torch.dtype], Tensor]
"""(a, b, format of the result)."""


def tensor_product(a: Scaled, b: Scaled, out: torch.dtype) -> Tensor:
    """a b^T of matrices that have one scale each, by ``torch._scaled_mm``. Run on CPUs only so far."""
    check(a, b, (PER_TENSOR,), (PER_TENSOR,))
    if empty := _of_nothing(a, b, out):
        return empty[0]
    return torch._scaled_mm(a.codes, b.codes.t(), scale_a=a.inverse, scale_b=b.inverse, out_dtype=out)


def block_reference(a: Scaled, b: Scaled, out: torch.dtype) -> Tensor:
    """a b^T of matrices with a scale per block: of what the codes stand for, in float32. There is no such product of
    FP8 on CPUs."""
    check(a, b, (ROW_BLOCK,), (ROW_BLOCK, SQUARE_BLOCK))
    return (a.values() @ b.values().t()).to(out)


def block_product(a: Scaled, b: Scaled, out: torch.dtype) -> Tensor:
    """The same on tensor cores (cuBLAS 12.9 on sm_90). Never run: the layouts of scales are those that torch checks."""
    check(a, b, (ROW_BLOCK,), (ROW_BLOCK, SQUARE_BLOCK))
    if empty := _of_nothing(a, b, out):
        return empty[0]
    kinds = functional.ScalingType
    if b.block == ROW_BLOCK:
        kind_b, inverse_b = kinds.BlockWise1x128, columns_first(b.inverse)
    else:
        kind_b, inverse_b = kinds.BlockWise128x128, in_fours(b.inverse).t()
    of_a = columns_first(a.inverse), kinds.BlockWise1x128
    return functional.scaled_mm(a.codes, b.codes.t(), *of_a, inverse_b, kind_b, output_dtype=out)


def columns_first(inverse: Tensor) -> Tensor:
    """Scales [m, blocks] with the strides (1, m)."""
    return inverse.t().contiguous().t()


def in_fours(inverse: Tensor) -> Tensor:
    """Scales [rows, blocks], a row filled up to a multiple of 4 blocks."""
    return functional.pad(inverse, (0, -inverse.shape[1] % 4)).contiguous()


def check(a: Scaled, b: Scaled, of_a: tuple[tuple[int, int], ...], of_b: tuple[tuple[int, int], ...]) -> None:
    """Raise ValueError where tensor cores would refuse the operands, on whatever device."""
    (m, k), (n, k_of_b) = a.codes.shape, b.codes.shape
    what = f"a product in FP8 of [{m}, {k}] and [{n}, {k_of_b}] transposed"
    if k != k_of_b:
        raise ValueError(f"{what} sums over {k} and {k_of_b} elements; both matrices must have as many columns")
    for name, size in (("columns that are summed over", k), ("rows of the second matrix", n)):
        if size % MULTIPLE:
            raise ValueError(f"{what} has {size} {name}; they must be a multiple of {MULTIPLE}: pad the matrix")
    for each in (a, b):
        if not each.codes.is_contiguous():
            raise ValueError(f"{what} has an operand with the strides {each.codes.stride()}; make it row-major")
    if a.codes.dtype == b.codes.dtype == E5M2.dtype:
        raise ValueError(f"{what}: both are in E5M2, which no tensor core multiplies; one must be in E4M3")
    if a.block not in of_a or b.block not in of_b:
        raise ValueError(f"{what}: blocks of {a.block} and {b.block} need another product; take {of_a} and {of_b}")
    if a.block != PER_TENSOR and not a.codes.dtype == b.codes.dtype == E4M3.dtype:
        raise ValueError(f"{what}: matrices scaled in blocks must be in E4M3")


def _of_nothing(a: Scaled, b: Scaled, out: torch.dtype) -> tuple[Tensor, ...]:
    """The product where it needs no arithmetic, which backends refuse; else nothing."""
    if a.codes.numel() and b.codes.numel():
        return ()
    return (torch.zeros(a.codes.shape[0], b.codes.shape[0], dtype=out, device=a.codes.device),)


def _capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; one that is only imagined, by a dry run on a machine without any, is an H100."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 0)


def _refuses(least: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str:
    if dtype not in (torch.float32, torch.bfloat16):
        return f"made for float32 and bfloat16, not {dtype}"
    if device.type == "cuda" and _capability(device) < least:
        return f"needs compute capability {least[0]}.{least[1]}, not {_capability(device)}"
    return ""


def tensor_refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why ``tensor_product`` cannot serve, or ''."""
    return _refuses((8, 9), device, dtype)


def block_refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why ``block_product`` cannot serve, or ''."""
    if device.type != "cuda":
        return f"torch has no product of blocks in FP8 on {device.type}"
    if not hasattr(functional, "scaled_mm"):
        return "this torch has no scaled_mm; 2.10 has"
    if _capability(device)[0] != 9:
        return f"made for sm_90, not {_capability(device)}"
    return _refuses((9, 0), device, dtype)


def reference_refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why ``block_reference`` cannot serve, or '': on a GPU it would be slower than no FP8 at all."""
    if device.type != "cpu":
        return f"made for CPUs, not {device.type}"
    return _refuses((0, 0), device, dtype)


BLOCK_PRODUCTS = (
    Kernel("linear", "fp8 block, torch scaled_mm", block_product, block_refuses),
    Kernel("linear", "fp8 block, dequantising reference", block_reference, reference_refuses),
)


def product_of(recipe: str, device: torch.device, dtype: torch.dtype) -> tuple[Product, Choice]:
    """The product of a recipe (current, delayed or block). Raises ValueError where there is none."""
    of_tensors = Kernel("linear", f"fp8 {recipe}, torch._scaled_mm", tensor_product, tensor_refuses)
    kernel, choice = first_willing(BLOCK_PRODUCTS if recipe == "block" else (of_tensors,), device, dtype)
    product: Product = kernel.function
    return product, choice
