"""The logical matrices that parameters consist of, and which rectangles of them a run is.

Some optimizers keep something for each row, column, head or matrix. What they mean is the matrix of the model: a fused
parameter is as many of them as its split has segments (query, key and value; gate and up), a vector of n numbers is
one of n rows and one column. A run (elements of the local tensor, one behind the other) may begin and end amidst a row
and span several of them: it falls into rectangles, which tile it.

    columns  0 1 2 3 4 5        run [4, 19) of a local tensor with 6 columns:
    row 0    . . . . a a        a 1 x 2 rectangle
    row 1    b b b b b b        a 2 x 6 rectangle, cut where a segment ends
    row 2    b b b b b b
    row 3    c . . . . .        a 1 x 1 rectangle
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from megacore.layout.shards import Run
from megacore.spec.params import ParamSpec


@dataclass(frozen=True, order=True)
class Matrix:
    """Segment ``segment`` of parameter ``name``: ``rows`` x ``columns``, all ranks together.

    ``unit`` is how many rows (columns, where the parameter is split by columns) are never cut apart by tp: a head's.
    """

    name: str
    segment: int
    rows: int
    columns: int
    unit: int
    is_vector: bool

    @property
    def numel(self) -> int:
        """Elements."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Rectangle:
    """``height`` x ``width`` elements of a matrix from (``row``, ``column``) on, as they lie in a run.

    Its rows begin in the run at ``offset``, ``offset + stride``... Of all ranks that hold these elements exactly one
    is ``owned``.
    """

    matrix: Matrix
    row: int
    column: int
    height: int
    width: int
    offset: int
    stride: int
    owned: bool


def matrices_of(spec: ParamSpec) -> tuple[Matrix, ...]:
    """The logical matrices of a parameter, in order of its segments."""
    rows, columns = _as_matrix(spec.shape)
    is_vector = len(spec.shape) == 1
    if spec.split is None:
        return (Matrix(spec.name, 0, rows, columns, 1, is_vector),)
    return tuple(
        Matrix(spec.name, i, segment.size, columns, segment.unit, is_vector)
        if spec.dim == 0
        else Matrix(spec.name, i, rows, segment.size, segment.unit, is_vector)
        for i, segment in enumerate(spec.split.segments)
    )


def is_hidden_matrix(spec: ParamSpec) -> bool:
    """Whether it maps hidden activations to hidden activations: a matrix of a block, fused or not.

    Embeddings and the output matrix do not: tokens are on their other side.
    """
    return spec.is_matmul and len(spec.shape) >= 2 and not spec.name.startswith("head.")


def rectangles_of(spec: ParamSpec, run: Run, index: int, num: int) -> tuple[Rectangle, ...]:
    """What a run of member ``index`` of ``num`` on tp consists of; every element is in exactly one rectangle."""
    return tuple(_rectangles(spec, run, index, num))


def region_of(spec: ParamSpec, rectangle: Rectangle) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(start, size) of a rectangle in the parameter's global tensor."""
    segments = spec.split.segments if spec.split else ()
    begin = sum(segment.size for segment in segments[: rectangle.matrix.segment])
    row, column = (
        (rectangle.row + begin, rectangle.column) if spec.dim == 0 else (rectangle.row, rectangle.column + begin)
    )
    if len(spec.shape) == 1:
        return (row,), (rectangle.height,)
    return (row, column), (rectangle.height, rectangle.width)


def _rectangles(spec: ParamSpec, run: Run, index: int, num: int) -> Iterator[Rectangle]:
    matrices = matrices_of(spec)
    sizes = [segment.size for segment in spec.split.segments] if spec.split else [spec.shape[0]]
    begins = list(accumulate(sizes, initial=0))
    _, stride = _as_matrix(spec.local_shape(index, num))
    for top, bottom, left, right in _bands(run.start, run.stop, stride):
        for piece in spec.pieces(index, num):
            segment = next(i for i, size in enumerate(sizes) if begins[i] <= piece.start < begins[i] + size)
            shift = piece.start - begins[segment] - piece.local  # from the local tensor to the matrix
            end = piece.local + piece.size
            if spec.dim == 0:
                first, last, low, high = max(top, piece.local), min(bottom, end), left, right
                row, column = first + shift, low
            else:
                first, last, low, high = top, bottom, max(left, piece.local), min(right, end)
                row, column = first, low + shift
            if first < last and low < high:
                offset = first * stride + low - run.start
                size = (last - first, high - low)
                yield Rectangle(matrices[segment], row, column, *size, offset, stride, piece.copy == 0)


def _bands(start: int, stop: int, stride: int) -> Iterator[tuple[int, int, int, int]]:
    """(top, bottom, left, right) of the end of a row, the whole rows and the beginning of a row."""
    top, left = divmod(start, stride)
    bottom, right = divmod(stop, stride)
    if top == bottom:
        yield top, top + 1, left, right
        return
    if left:
        yield top, top + 1, left, stride
        top += 1
    if top < bottom:
        yield top, bottom, 0, stride
    if right:
        yield bottom, bottom + 1, 0, right


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns)."""
    assert 1 <= len(shape) <= 2, f"{shape} is neither a vector nor a matrix"
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], 1)
