"""Where each parameter lies in a flat buffer: pure slot arithmetic, no storage."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ALIGNMENT = 64
"""Elements: slots start at multiples of it, so that views are aligned for vector units and reductions."""


@dataclass(frozen=True)
class Slot:
    """Parameter ``name`` of local shape ``shape`` occupies ``[offset, offset + numel)``."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int

    @property
    def end(self) -> int:
        """Where the next slot may begin."""
        return self.offset + -(-self.numel // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class BufferLayout:
    """Slots in the order of the stage's parameters; ``size`` includes the alignment gaps."""

    slots: tuple[Slot, ...]
    size: int

    @classmethod
    def of(cls, shapes: Iterable[tuple[str, Sequence[int]]]) -> "BufferLayout":
        """Lay (name, local shape) pairs one after the other."""
        slots, offset = [], 0
        for name, shape in shapes:
            numel = 1
            for length in shape:
                numel *= length
            slots.append(Slot(name, tuple(shape), offset, numel))
            offset = slots[-1].end
        return cls(tuple(slots), offset)


def buckets(slots: Sequence[Slot], num_elements: int) -> tuple[tuple[int, int], ...]:
    """Cut neighbouring slots at their boundaries into (start, end) runs of about ``num_elements``, last slots first.

    Backward finishes the last layers first, so their bucket can be reduced first.
    """
    if not slots:
        return ()
    cuts = [slots[-1].end]
    for slot in reversed(slots):
        if cuts[-1] - slot.offset >= num_elements:
            cuts.append(slot.offset)
    if cuts[-1] > slots[0].offset:
        cuts.append(slots[0].offset)
    return tuple((cuts[i + 1], cuts[i]) for i in range(len(cuts) - 1))
