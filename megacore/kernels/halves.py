"""float32 numbers as two halves of 16 bits, of which the upper one is a bf16 number by itself.

The upper half is the number rounded to bf16 (ties away from 0), so that it is as good a weight as bf16 has; the lower
one is how far the bits of the two are apart, from -2^15 to 2^15 - 1. Together they are the number, to the last bit.
"""

import torch
from torch import Tensor


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """float32, any shape, to (bf16 upper, int16 lower) halves of this shape."""
    bits = values.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """What `split` took apart: bf16 and int16 to float32."""
    bits = upper.view(torch.int16).to(torch.int32) << 16
    return (bits + lower).view(torch.float32)
