"""Where each parameter lies in a flat buffer: pure slot arithmetic, no storage."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

ALIGNMENT = 64
"""Elements: slots start at multiples of it, so that views are aligned for vector units and reductions."""

Shapes = Iterable[tuple[str, Sequence[int]]]


@dataclass(frozen=True)
class Slot:
    """Parameter ``name`` of local shape ``shape`` occupies ``[offset, offset + numel)``."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int

    def of(self, buffer: Any, begin: int = 0) -> Any:
        """The parameter's view of a flat tensor that holds the layout from element ``begin`` on."""
        return buffer[self.offset - begin : self.offset - begin + self.numel].reshape(self.shape)


@dataclass(frozen=True)
class BufferLayout:
    """Slots in the order of the rank's parameters; ``size`` includes the alignment gaps.

    ``buckets`` are the (start, end) of the runs of slots that travel in one message; they cover the buffer.
    """

    slots: tuple[Slot, ...]
    size: int
    buckets: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, shapes: Shapes) -> "BufferLayout":
        """Lay (name, local shape) pairs one after the other, in one bucket."""
        return cls.in_buckets([shapes])

    @classmethod
    def in_buckets(
        cls, groups: Iterable[Shapes], num_shards: int = 1, room: Mapping[str, int] = MappingProxyType({})
    ) -> "BufferLayout":
        """A bucket for each group of (name, local shape) pairs, padded so that its ``num_shards`` equal pieces are
        aligned, too. Groups without elements have none. ``room`` keeps more elements for a parameter than it has: so
        that ranks that hold different numbers of its rows have everything else at the same places."""
        slots: list[Slot] = []
        buckets: list[tuple[int, int]] = []
        begin = 0
        for shapes in groups:
            offset = begin
            for name, shape in shapes:
                numel = math.prod(shape)
                slots.append(Slot(name, tuple(shape), offset, numel))
                offset += _aligned(max(numel, room.get(name, 0)), ALIGNMENT)
            if offset > begin:
                end = begin + _aligned(offset - begin, ALIGNMENT * num_shards)
                buckets.append((begin, end))
                begin = end
        return cls(tuple(slots), begin, tuple(buckets))


def groups_of_size(shapes: Shapes, num_elements: int) -> list[list[tuple[str, Sequence[int]]]]:
    """Cut (name, local shape) pairs into groups of at least ``num_elements``; only the first may be smaller.

    Backward finishes the last parameters first, so their group is full and travels first.
    """
    groups: list[list[tuple[str, Sequence[int]]]] = [[]]
    size = 0
    for name, shape in reversed(list(shapes)):
        if size >= num_elements:
            groups.append([])
            size = 0
        groups[-1].append((name, shape))
        size += math.prod(shape)
    return [group[::-1] for group in reversed(groups)]


def _aligned(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
