"""Sums and maxima over rows, columns and whole matrices, whatever ranks their elements lie on.

Each rank folds what it owns of every matrix into its place of one vector, and the vector is reduced over the ranks:
one collective per group and pass, however many matrices there are. Every number is in float32 at least.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from types import MappingProxyType

import torch
from torch import Tensor

from megacore.mesh.collectives import all_reduce, gather_objects
from megacore.optim.rule import Share
from megacore.spec import ParamSpec
from megacore.spec.matrices import Rectangle, matrices_of, rectangles_of

_FOLDS: Mapping[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = MappingProxyType(
    {"sum": (torch.sum, torch.add), "max": (torch.amax, torch.maximum)}
)


class Matrices:
    """All logical matrices of the ranks that share a stage, the same list on all of them, and this rank's part.

    A vector with a number per row holds the rows of all matrices one behind the other, in their order; likewise per
    column. *Margins* are both: [num_rows + num_columns]. ``lengths`` are margins too: of how many elements a row or
    column consists; ``numels`` [number of matrices] are the matrices' elements.

    Constructing it is collective over the share's groups: a rank does not know what the others' runs belong to.
    """

    def __init__(self, share: Share) -> None:
        self.share = share
        self.dtype = torch.promote_types(share.dtype, torch.float32)
        self.matrices = tuple(matrix for spec in _all_specs(share) for matrix in matrices_of(spec))
        self.place = {matrix: i for i, matrix in enumerate(self.matrices)}
        self.rectangles = tuple(
            rectangles_of(spec, run, share.tp.rank, share.tp.size) for spec, run in zip(share.specs, share.runs)
        )
        rows, columns = [m.rows for m in self.matrices], [m.columns for m in self.matrices]
        self.num_rows, self.num_columns = sum(rows), sum(columns)
        self._sizes = rows + columns
        self._begins = list(accumulate(self._sizes, initial=0))
        counts = torch.tensor([rows, columns], dtype=torch.long, device=share.device)
        places = torch.arange(len(rows), device=share.device)
        sizes = {"output_size": self.num_rows}, {"output_size": self.num_columns}
        self.matrix_of_row = places.repeat_interleave(counts[0], **sizes[0])
        lengths = torch.cat(
            [counts[1].repeat_interleave(counts[0], **sizes[0]), counts[0].repeat_interleave(counts[1], **sizes[1])]
        )
        self.lengths = lengths.to(self.dtype)
        self.numels = torch.tensor([m.numel for m in self.matrices], dtype=self.dtype, device=share.device)

    def zeros(self, size: int) -> Tensor:
        """A vector for statistics: 1-D."""
        return torch.zeros(size, dtype=self.dtype, device=self.share.device)

    def rows(self, rectangle: Rectangle) -> slice:
        """Where a rectangle's rows lie in margins, or in a vector with a number per row."""
        begin = self._begins[self.place[rectangle.matrix]] + rectangle.row
        return slice(begin, begin + rectangle.height)

    def columns(self, rectangle: Rectangle) -> slice:
        """Where a rectangle's columns lie in margins."""
        begin = self._begins[len(self.matrices) + self.place[rectangle.matrix]] + rectangle.column
        return slice(begin, begin + rectangle.width)

    def rows_by_matrix(self, margins: Tensor) -> tuple[Tensor, ...]:
        """Views of margins, or of a vector with a number per row: each matrix' rows."""
        return margins[: self.num_rows].split(self._sizes[: len(self.matrices)])

    def columns_by_matrix(self, margins: Tensor) -> tuple[Tensor, ...]:
        """Views of margins: each matrix' columns."""
        return margins[self.num_rows :].split(self._sizes[len(self.matrices) :])

    def views(self, run: int, tensor: Tensor) -> Iterator[tuple[Rectangle, Tensor]]:
        """The rectangles of a run, each with its [height, width] view of the run's 1-D tensor."""
        return ((rectangle, view_of(rectangle, tensor)) for rectangle in self.rectangles[run])

    def each(self, tensors: Iterable[Tensor]) -> Iterator[tuple[Rectangle, Tensor]]:
        """The rectangles of all runs, as ``views``; one tensor per run, of which one at a time is asked for."""
        for run, tensor in zip(range(len(self.rectangles)), tensors, strict=True):
            yield from self.views(run, tensor)

    def margins(self, tensors: Iterable[Tensor], op: str = "sum") -> Tensor:
        """This rank's part of the sum or maximum (of what is not negative) of every row and column."""
        fold, combine = _FOLDS[op]
        margins = self.zeros(self.num_rows + self.num_columns)
        for rectangle, view in self._owned(tensors):
            rows, columns = margins[self.rows(rectangle)], margins[self.columns(rectangle)]
            combine(rows, fold(view, dim=1), out=rows)
            combine(columns, fold(view, dim=0), out=columns)
        return margins

    def row_sums(self, tensors: Iterable[Tensor]) -> Tensor:
        """This rank's part of the sum of every row: [num_rows]."""
        sums = self.zeros(self.num_rows)
        for rectangle, view in self._owned(tensors):
            sums[self.rows(rectangle)] += view.sum(dim=1)
        return sums

    def sums(self, tensors: Iterable[Tensor]) -> Tensor:
        """This rank's part of the sum of every matrix: [number of matrices]."""
        sums = self.zeros(len(self.matrices))
        for rectangle, view in self._owned(tensors):
            sums[self.place[rectangle.matrix]] += view.sum()
        return sums

    def reduce(self, *parts: Tensor, op: str = "sum") -> tuple[Tensor, ...]:
        """The 1-D parts of all ranks as wholes: one all-reduce over ``shards`` and one over ``tp`` for all of them."""
        packed = torch.cat(parts)
        for group in (self.share.shards, self.share.tp):
            all_reduce(packed, group, op)
        return packed.split([part.numel() for part in parts])

    def _owned(self, tensors: Iterable[Tensor]) -> Iterator[tuple[Rectangle, Tensor]]:
        return ((rectangle, view) for rectangle, view in self.each(tensors) if rectangle.owned)


def view_of(rectangle: Rectangle, tensor: Tensor) -> Tensor:
    """[height, width], of its run's 1-D contiguous tensor."""
    size, stride = (rectangle.height, rectangle.width), (rectangle.stride, 1)
    return tensor.as_strided(size, stride, tensor.storage_offset() + rectangle.offset)


def _all_specs(share: Share) -> list[ParamSpec]:
    """Of every parameter that has a run on some rank, in order of names: the same on all ranks, however it is cut."""
    specs = {spec.name: spec for spec in share.specs}
    for group in (share.shards, share.tp):
        for others in gather_objects(specs, group):
            specs = {**others, **specs}
    return [specs[name] for name in sorted(specs)]
