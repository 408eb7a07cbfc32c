"""The two formats of 8 bits, and how tensors get into them and back.

Codes are x times a scale, rounded to nearest (ties to even). Finite numbers that the format cannot hold become its
largest; infinities and nan become nan, so an overflow is still seen in the gradient's norm and the step skipped.

Scales are powers of two: they change no mantissa. So a code does not depend on its tensor's scale at all, but where the
format ends: elements some 2^15 (E4M3) or 2^30 (E5M2) times smaller than the largest lose bits, and what is beyond the
largest is cut. That is why ranks may scale their own parts of one tensor by their own largest elements.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LEAST = 2.0**-100
"""Largest elements below this count as this: scales and their inverses stay normal float32, also of zeros."""

EXPONENT_BITS = 0x7F800000
"""Of a float32."""

PER_TENSOR = (0, 0)
ROW_BLOCK, SQUARE_BLOCK = (1, 128), (128, 128)
"""Rows and columns that share a scale."""


@dataclass(frozen=True)
class Format:
    """One of the formats; ``largest`` is its largest finite number."""

    name: str
    dtype: torch.dtype
    largest: float


E4M3 = Format("E4M3", torch.float8_e4m3fn, 448.0)
"""More precise: activations and weights."""
E5M2 = Format("E5M2", torch.float8_e5m2, 57344.0)
"""Of a wider range: gradients."""


@dataclass(frozen=True)
class Scaled:
    """A matrix in FP8. codes [m, k], row-major; ``inverse``, float32, is what they are multiplied with: of the shape
    () or, with blocks of (rows, columns), [m / rows, k / columns], rounded up."""

    codes: Tensor
    inverse: Tensor
    block: tuple[int, int] = PER_TENSOR

    def values(self) -> Tensor:
        """What the codes stand for, exactly: float32 [m, k]."""
        wide = self.codes.float()
        return wide.mul_(self.inverse if self.block == PER_TENSOR else spread(self.inverse, self.block, wide.shape))

    def t(self) -> "Scaled":
        """The transposed matrix, row-major again."""
        inverse = self.inverse if self.block == PER_TENSOR else self.inverse.t()
        return Scaled(self.codes.t().contiguous(), inverse, (self.block[1], self.block[0]))


def amax_of(x: Tensor) -> Tensor:
    """The largest absolute value, a float32 scalar: 0 of an empty tensor, nan if there is one."""
    if not x.numel():
        return torch.zeros((), dtype=torch.float32, device=x.device)
    least, largest = torch.aminmax(x.detach())
    return torch.maximum(-least, largest).float()


def amax_of_blocks(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[m, k] to float32 [m / rows, k / columns], rounded up: of each block, of which the last ones may be smaller."""
    (m, k), (rows, columns) = x.shape, block
    padded = functional.pad(x.detach().abs(), (0, -k % columns, 0, -m % rows))
    return padded.view(-(-m // rows), rows, -(-k // columns), columns).amax((1, 3)).float()


def scale_of(amax: Tensor, kind: Format, margin: int = 0) -> Tensor:
    """The largest power of two that keeps ``amax`` (float32, any shape) times itself within the format's range, and
    then ``margin`` powers below. nan where amax is not finite."""
    ratio = kind.largest / amax.clamp(min=LEAST)
    power = (ratio.view(torch.int32) & EXPONENT_BITS).view(torch.float32)
    return torch.where(amax.isfinite(), power * 2.0**-margin, torch.nan)


def encode(x: Tensor, scale: Tensor, kind: Format) -> Tensor:
    """x * scale in the format; ``scale`` is of a shape that can be multiplied with x's."""
    wide = x.float()
    codes = (wide * scale).clamp_(-kind.largest, kind.largest)
    return codes.add_(wide - wide).to(kind.dtype)  # nan of what is not finite, 0 of all else


def quantise_blocks(x: Tensor, kind: Format, block: tuple[int, int]) -> Scaled:
    """A matrix [m, k] whose blocks are scaled by their own largest elements."""
    scale = scale_of(amax_of_blocks(x, block), kind)
    return Scaled(encode(x, spread(scale, block, x.shape), kind).contiguous(), 1 / scale, block)


def spread(of_blocks: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """A number of each block, for each of its elements: [m / rows, k / columns] to [m, k]."""
    for dim in range(2):
        of_blocks = of_blocks.repeat_interleave(block[dim], dim).narrow(dim, 0, shape[dim])
    return of_blocks
