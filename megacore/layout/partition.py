"""Which part of a dim belongs to which member of an axis.

A dim is a row of segments (a fused query-key-value matrix has three), each made of indivisible units (a head has
``head_dim`` rows, a vocabulary entry has 1). Units are dealt out in order, as evenly as possible: members
differ by at most one unit, the first ones hold more. A segment with fewer units than members may be *replicated*
instead (kv heads fewer than tp ranks): then neighbours hold copies of one unit.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Rows ``[start, start+size)`` of the global dim, which lie at ``local`` in the member's own tensor.

    ``copies`` members hold these rows; ``copy`` numbers this one (0 is the owner: the one that counts and saves).
    """

    start: int
    size: int
    local: int
    copy: int = 0
    copies: int = 1


@dataclass(frozen=True)
class Segment:
    """A run of a dim that is split by itself: ``size`` rows in units of ``unit``."""

    size: int
    unit: int = 1
    replicate: bool = False


@dataclass(frozen=True)
class Split:
    """Dim ``dim`` of a parameter, made of ``segments``, is dealt out along ``axis``."""

    dim: int
    axis: str
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Length of the global dim."""
        return sum(segment.size for segment in self.segments)

    def pieces(self, index: int, num: int) -> tuple[Piece, ...]:
        """What member ``index`` of ``num`` holds, in local order; empty pieces are left out."""
        pieces: list[Piece] = []
        local = begin = 0
        for segment in self.segments:
            start, size, copy, copies = _share(segment, index, num)
            if size:
                pieces.append(Piece(begin + start, size, local, copy, copies))
            local += size
            begin += segment.size
        return tuple(pieces)

    def local_size(self, index: int, num: int) -> int:
        """Length of the dim at member ``index`` of ``num``."""
        return sum(piece.size for piece in self.pieces(index, num))


def balanced(total: int, num: int, index: int) -> tuple[int, int]:
    """(start, size) of share ``index`` of ``total`` things dealt to ``num`` in order, the first ones getting more."""
    base, extra = divmod(total, num)
    return index * base + min(index, extra), base + (index < extra)


def _share(segment: Segment, index: int, num: int) -> tuple[int, int, int, int]:
    """(start, size, copy, copies) within the segment."""
    num_units = segment.size // segment.unit
    if segment.replicate and num_units < num:
        if num % num_units:
            raise ValueError(f"{num_units} units can be neither split nor copied evenly over {num} ranks")
        copies = num // num_units
        return index // copies * segment.unit, segment.unit, index % copies, copies
    start, size = balanced(num_units, num, index)
    return start * segment.unit, size * segment.unit, 0, 1
