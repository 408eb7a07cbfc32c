"""Tensors that lie in parts, as ranks saved them, read as the whole that they make."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from megacore.checkpoint.hf.tensor_files import StoredTensor
from megacore.checkpoint.parts import overlap


@dataclass(frozen=True)
class Part:
    """``[start, start + size)`` of a whole tensor; it begins at ``origin`` of what ``stored`` finds in a file."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    origin: tuple[int, ...]
    stored: Callable[[], StoredTensor]


@dataclass(frozen=True)
class Whole:
    """A tensor of shape ``shape``; ``what`` is its name and place for messages."""

    what: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]

    def check(self) -> "Whole":
        """Raise ValueError where parts are missing, double, or reach beyond the whole."""
        places = {part.start for part in self.parts}
        sizes = sum(prod(part.size) for part in self.parts)
        ends = [tuple(at + n for at, n in zip(part.start, part.size, strict=True)) for part in self.parts]
        inside = all(end <= limit for each in ends for end, limit in zip(each, self.shape, strict=True))
        if not inside or len(places) < len(self.parts) or sizes != prod(self.shape):
            raise ValueError(f"{self.what} of shape {list(self.shape)} is not whole: parts of it are missing or double")
        return self

    def layer(self, number: int, what: str) -> "Whole":
        """``[number]`` of a tensor whose dim 0 counts layers."""
        parts = [part for part in self.parts if part.start[0] <= number < part.start[0] + part.size[0]]
        return Whole(what, self.shape[1:], self.dtype, tuple(_layer_of(part, number) for part in parts))

    def moved(self, rows: int) -> tuple[Part, ...]:
        """The parts, so many rows further down."""
        return tuple(replace(part, start=(part.start[0] + rows, *part.start[1:])) for part in self.parts)

    def fill(self, start: Sequence[int], out: Tensor) -> None:
        """Write the slice that begins at ``start`` and has the shape of ``out`` into it.

        Raises ValueError where a file is not whole, or holds a tensor of another shape or format than it should.
        """
        missing = out.numel()
        for part in self.parts:
            common = overlap((part.start, part.size), (tuple(start), tuple(out.shape)))
            if common is None:
                continue
            stored = part.stored()
            if len(stored.shape) != len(self.shape) or stored.dtype != self.dtype:
                raise ValueError(f"{self.what} is {stored.dtype} {list(stored.shape)} in {stored.file}: it was damaged")
            place = tuple(slice(at - own, at - own + n) for at, own, n in zip(common[0], start, common[1]))
            begin = [at - own + origin for at, own, origin in zip(common[0], part.start, part.origin)]
            stored.fill(begin, out[place])
            missing -= prod(common[1])
        if missing:
            raise ValueError(f"{self.what} is not whole: {missing} numbers of a slice at {list(start)} are nowhere")


def _layer_of(part: Part, number: int) -> Part:
    index = number - part.start[0] + part.origin[0]

    def stored() -> StoredTensor:
        stack = part.stored()
        if len(stack.shape) != len(part.size) or index >= stack.shape[0]:
            raise ValueError(f"{stack.file} holds a tensor of shape {list(stack.shape)} instead of {list(part.size)}")
        each = prod(stack.shape[1:]) * stack.dtype.itemsize
        return replace(stack, offset=stack.offset + index * each, shape=stack.shape[1:])

    return Part(part.start[1:], part.size[1:], part.origin[1:], stored)
