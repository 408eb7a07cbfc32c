"""Numbers in 8 bits and a scale for every 64: dynamic block-wise quantisation (Dettmers et al. 2022).

A block's numbers are divided by the largest magnitude among them; what is left, in [-1, 1], becomes the nearest of
256 codes. These are dense near 0 on a logarithmic scale (section 2.2 of the paper, "dynamic tree"): a code has e
leading zeros that say 10^-e and, behind a 1, linear steps from 0.1 to 1 in the bits that remain.

Two departures from the paper. Blocks have 64 elements rather than 2048, which costs 1/16 byte per element: a shard is
cut at multiples of 64 elements only (``layout.buffer.ALIGNMENT``), so that no cut goes through a block. And where
numbers are never negative, one that is not 0 does not become 0: an Adam that divides by it would take a huge step.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megacore.layout.buffer import ALIGNMENT

BLOCK = ALIGNMENT
"""Elements that share a scale."""

EXPONENTS = 7
"""Powers of ten that the codes span."""

DROPPED = 14
"""Lower bits of a float32 that do not decide about its code."""


def codebook(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of the codes, ascending, float32: in [-1, 1], or in [0, 1] if not ``signed``."""
    positive = [value for e in range(EXPONENTS) for value in _steps(e, 6 - e if signed else 7 - e)]
    negative = [-value for value in positive] if signed else []
    return torch.tensor(sorted([*negative, 0.0, *positive, 1.0]), dtype=torch.float32, device=device)


def _steps(exponent: int, bits: int) -> Iterator[float]:
    """The middles of 2^bits equal steps from 0.1 to 1, times 10^-exponent."""
    num = 1 << bits
    return ((0.1 + 0.9 * (step + 0.5) / num) * 10.0**-exponent for step in range(num))


def lookup(codes: Tensor) -> Tensor:
    """The code of every number in [-1, 1] by the upper 18 bits of its float32 (sign, exponent, 9 of 23 bits behind
    it): uint8 [2^18]. A number between two codes falls to the nearer one, but where it is within 0.1% of the middle."""
    upper = torch.arange(1 << (32 - DROPPED), device=codes.device, dtype=torch.int32)
    middle = ((upper << DROPPED) + (1 << (DROPPED - 1))).view(torch.float32)
    nearest = torch.bucketize(middle, (codes[1:] + codes[:-1]) / 2)
    if codes[0] == 0:
        nearest[1:].clamp_(min=1)
    return nearest.to(torch.uint8)


def encode(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(uint8 codes [n], float32 scales [ceil(n / BLOCK)]) of ``values`` [n]; table: of ``lookup``."""
    num = values.numel()
    blocks = torch.nn.functional.pad(values.to(torch.float32), (0, -num % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    shares = (blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).view(-1)[:num]
    upper = (shares.view(torch.int32) >> DROPPED).bitwise_and_((1 << (32 - DROPPED)) - 1)
    return table.index_select(0, upper), scales


def decode(encoded: Tensor, scales: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``encode`` was given, about, in ``dtype``; codes: of ``codebook``."""
    num = encoded.numel()
    shares = codes.to(dtype).index_select(0, encoded.to(torch.int32))
    blocks = torch.nn.functional.pad(shares, (0, -num % BLOCK)).view(-1, BLOCK)
    return (blocks * scales[:, None].to(dtype)).view(-1)[:num]
