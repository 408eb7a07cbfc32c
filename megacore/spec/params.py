"""One description of a parameter, from which initialisation, gradient sums, the global norm, ZeRO slots and
checkpoint slices all derive."""

import math
from dataclasses import dataclass

from megacore.layout.partition import Piece, Segment, Split


@dataclass(frozen=True)
class ParamSpec:
    """A parameter as the whole model sees it.

    ``shape`` is global. ``split`` says which dim is dealt out over which axis (None: every rank holds all of it).
    ``partial`` names the axes whose ranks each see only a part of its gradient, beyond the data axes: those
    gradients are summed before use. ``decay`` is whether weight decay applies; ``init`` is the distribution and
    ``std`` its width. Of a mixture's ``experts`` the matrices are stacked along dim 0, which ep deals out.
    """

    name: str
    shape: tuple[int, ...]
    split: Split | None = None
    partial: tuple[str, ...] = ()
    init: str = "normal"
    std: float = 0.0
    decay: bool = True
    is_matmul: bool = False
    experts: int = 0

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    def local_shape(self, index: int, num: int) -> tuple[int, ...]:
        """Shape at member ``index`` of ``num`` on the axis that splits it."""
        if self.split is None:
            return self.shape
        dim, size = self.split.dim, self.split.local_size(index, num)
        return (*self.shape[:dim], size, *self.shape[dim + 1 :])

    def local_numel(self, index: int, num: int) -> int:
        """Elements at member ``index`` of ``num``."""
        return math.prod(self.local_shape(index, num))

    def pieces(self, index: int, num: int) -> tuple[Piece, ...]:
        """What member ``index`` of ``num`` holds of the split dim (dim 0 where nothing is split).

        A parameter that is not split is one piece with ``num`` copies.
        """
        if self.split is None:
            return (Piece(0, self.shape[0], 0, index, num),)
        return self.split.pieces(index, num)

    @property
    def dim(self) -> int:
        """The dim that ``pieces`` speak of."""
        return self.split.dim if self.split else 0


def rows(*segments: Segment) -> Split:
    """Dim 0 (a matrix' outputs) over tp."""
    return Split(0, "tp", segments)


def columns(*segments: Segment) -> Split:
    """Dim 1 (a matrix' inputs) over tp."""
    return Split(1, "tp", segments)


def of_experts(split: Split) -> Split:
    """The same of matrices that are stacked, over etp."""
    return Split(split.dim + 1, "etp", split.segments)
