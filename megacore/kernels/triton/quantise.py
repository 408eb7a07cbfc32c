"""A tensor in FP8 with one scale, and its largest element: both in one pass over it.

Rounding is done on the bits of float32, to nearest with ties to even: the same on every processor, also on those
without FP8. It agrees with torch's own conversion (the reference), code by code.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacore.kernels.fp8.formats import E4M3, E5M2
from megacore.kernels.triton.launch import NAMESPACE

BLOCK = 1024


@triton.jit
def _codes(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """Codes (int32) of float32 numbers that are within the format's range; of what is not finite, nan."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    drop: tl.constexpr = 23 - MANTISSA
    half: tl.constexpr = (1 << (drop - 1)) - 1
    rounded = (size + half + ((size >> drop) & 1)) >> drop
    normal = rounded - ((127 - BIAS) << MANTISSA)
    # below the smallest normal number the spacing is fixed: adding a number of that spacing rounds
    shift: tl.constexpr = 2.0 ** (23 + 1 - BIAS - MANTISSA)
    small = (size.to(tl.float32, bitcast=True) + shift) - shift
    subnormal = (small * (2.0 ** (MANTISSA + BIAS - 1))).to(tl.int32)
    code = tl.where(size < ((128 - BIAS) << 23), subnormal, normal)
    return sign | tl.where(size >= 0x7F800000, 0x7F, code)


@triton.jit
def _quantise(
    x, scale, codes, largest, numel,
    MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    place = program * BLOCK + tl.arange(0, BLOCK)
    inside = place < numel
    wide = tl.load(x + place, mask=inside, other=0).to(tl.float32)
    size = tl.abs(wide)
    bits = size.to(tl.int32, bitcast=True)  # ordered as the numbers are, with nan above all
    tl.store(largest + program, tl.max(bits, 0))
    scaled = wide * tl.load(scale)
    within = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
    finite = (bits < 0x7F800000) & (scaled == scaled)
    code = tl.where(finite, _codes(within, MANTISSA, BIAS), 0x7F)
    tl.store(codes + place, code.to(tl.uint8), mask=inside)


@torch.library.custom_op(f"{NAMESPACE}::quantise", mutates_args=())
def _quantise_op(x: Tensor, scale: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    kind = E5M2 if gradient else E4M3
    flat = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    if not x.numel():
        return codes.view(kind.dtype), torch.zeros((), dtype=torch.float32, device=x.device)
    programs = triton.cdiv(x.numel(), BLOCK)
    largest = torch.empty(programs, dtype=torch.int32, device=x.device)
    _quantise[(programs,)](
        flat, scale, codes, largest, x.numel(),
        MANTISSA=2 if gradient else 3, BIAS=15 if gradient else 7, LARGEST=kind.largest, BLOCK=BLOCK,
    )  # fmt: skip
    return codes.view(kind.dtype), largest.max().view(torch.float32)


@_quantise_op.register_fake
def _(x: Tensor, scale: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    kind = E5M2 if gradient else E4M3
    return x.new_empty(x.shape, dtype=kind.dtype), x.new_empty((), dtype=torch.float32)


def quantise(x: Tensor, scale: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """As ``reference_quantise``."""
    return _quantise_op(x, scale, gradient)
