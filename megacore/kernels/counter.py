"""Random numbers that are a function of a key and an index, not of a stream.

Element ``i`` of stream ``key`` is what splitmix64 (Steele, Lea and Flood 2014) gives in its step ``i`` from ``key``,
so a rank can draw exactly the elements it holds, and every layout draws the same weights and dropout masks. All
arithmetic is on int64 with wrap-around; a uniform is built from whole bits, a normal by Box-Muller from the two halves
of one hash.
"""

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def key_of(*parts: object) -> int:
    """A signed 64-bit key for a named stream, the same on every machine."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def hash64(key: int, index: Tensor) -> Tensor:
    """64 random bits per index. index: int64 of any shape; returns int64 of that shape."""
    bits = index * _GOLDEN
    bits += key
    bits ^= _shift(bits, 30)
    bits *= _MIX_1
    bits ^= _shift(bits, 27)
    bits *= _MIX_2
    bits ^= _shift(bits, 31)
    return bits


def uniform(key: int, index: Tensor) -> Tensor:
    """Uniform in [0, 1), float64, of the shape of ``index`` (int64)."""
    return _shift(hash64(key, index), 11).to(torch.float64) * 2.0**-53


def normal(key: int, index: Tensor) -> Tensor:
    """Standard normal, float64, of the shape of ``index`` (int64); tails end at 6.7."""
    bits = hash64(key, index)
    radius = _shift(bits, 32).to(torch.float64).add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = (bits & 0xFFFFFFFF).to(torch.float64).mul_(2 * math.pi * 2.0**-32).cos_()
    return radius.mul_(angle)


def _shift(bits: Tensor, by: int) -> Tensor:
    """Logical shift right (torch's own is arithmetic)."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
