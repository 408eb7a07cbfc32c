"""Slices of global tensors, and the memory in which a rank has them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megacore.kernels.halves import join, split

MAX_SLICE_BYTES = 1 << 24
"""Of what is written and hashed as one: who needs a little of it reads no more than this."""

Region = tuple[tuple[int, ...], tuple[int, ...]]
"""(start, size) in a global tensor."""


@dataclass(frozen=True)
class Part:
    """``[start, start + size)`` of the global tensor ``key`` of shape ``shape``, at home in ``tensor`` [*size].

    With ``lower`` (int16), ``tensor`` is the upper half of float32 numbers (``kernels.halves``), and these are meant.
    """

    key: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    tensor: Tensor
    lower: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that are meant."""
        return self.tensor.dtype if self.lower is None else torch.float32

    @property
    def num_bytes(self) -> int:
        """Of those numbers."""
        return self.tensor.numel() * self.dtype.itemsize

    @property
    def is_plain(self) -> bool:
        """Whether ``tensor`` is nothing but the numbers themselves, in memory of the host."""
        return self.lower is None and self.tensor.is_contiguous() and self.tensor.device.type == "cpu"

    def values(self) -> Tensor:
        """[*size]: the numbers; perhaps their home itself."""
        return self.tensor if self.lower is None else join(self.tensor, self.lower)

    @torch.no_grad()
    def fill(self, start: Sequence[int], values: Tensor) -> None:
        """Write numbers of any format to the place that begins at ``start`` of the global tensor."""
        place = tuple(slice(at - own, at - own + n) for at, own, n in zip(start, self.start, values.shape))
        if self.lower is None:
            self.tensor[place].copy_(values)
            return
        upper, lower = split(values.to(self.tensor.device, torch.float32))
        self.tensor[place].copy_(upper)
        self.lower[place].copy_(lower)

    def in_slices(self, max_bytes: int = MAX_SLICE_BYTES) -> Iterator["Part"]:
        """The same in parts of at most so many bytes, cut along dim 0, as far as rows allow."""
        if self.num_bytes <= max_bytes or not self.shape:
            yield self
            return
        rows = max(1, max_bytes * self.size[0] // self.num_bytes)
        for row in range(0, self.size[0], rows):
            count = min(rows, self.size[0] - row)
            lower = None if self.lower is None else self.lower[row : row + count]
            yield replace(
                self,
                start=(self.start[0] + row, *self.start[1:]),
                size=(count, *self.size[1:]),
                tensor=self.tensor[row : row + count],
                lower=lower,
            )


def overlap(one: Region, other: Region) -> Region | None:
    """What two regions of one tensor have in common, or None."""
    starts = tuple(max(a, b) for a, b in zip(one[0], other[0]))
    sizes = tuple(min(a + n, b + m) - s for a, n, b, m, s in zip(one[0], one[1], other[0], other[1], starts))
    return (starts, sizes) if all(size > 0 for size in sizes) else None
