"""Two halves are the number, and the upper one is the nearest there is."""

import struct

import torch
from hypothesis import given
from hypothesis import strategies as st

from megacore.kernels.halves import join, split


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=70))
def test_halves_are_the_number(numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    upper, lower = split(values)
    assert (upper.dtype, lower.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join(upper, lower).view(torch.int32), values.view(torch.int32)), "to the last bit, -0.0 too"
    rounded = values.to(torch.bfloat16)
    finite = rounded.isfinite() & upper.isfinite()
    off = (upper.double() - values.double()).abs() - (rounded.double() - values.double()).abs()
    assert (off[finite] == 0).all(), "another choice at ties, but never a worse one"


def test_a_tie_goes_away_from_zero() -> None:
    (tie,) = struct.unpack("f", struct.pack("I", 0x3F808000))  # between 1 and the bf16 after it
    upper, lower = split(torch.tensor([tie, -tie]))
    assert upper.tolist() == [1 + 2**-7, -1 - 2**-7] and lower.tolist() == [-(2**15)] * 2
