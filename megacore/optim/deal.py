"""Who works on which matrix, and when, where ranks hold matrices in pieces and one of them needs each whole.

Plain arithmetic on what all ranks know, so that they come to the same plan without a word.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megacore.spec.matrices import Matrix, Rectangle


class Place(NamedTuple):
    """A rank by its coordinates in the two groups that cut matrices: ``shards`` and ``tp``."""

    shard: int
    tp: int


@dataclass(frozen=True)
class Piece:
    """A rectangle of a matrix in run number ``run`` of the rank at ``place``."""

    place: Place
    run: int
    rectangle: Rectangle

    @property
    def numel(self) -> int:
        """Elements."""
        return self.rectangle.height * self.rectangle.width


@dataclass(frozen=True)
class Task:
    """A matrix, the rank that works on it, and where its pieces are, copies among them, in one order for all."""

    matrix: Matrix
    worker: Place
    pieces: tuple[Piece, ...]


def deal(
    pieces: Mapping[Matrix, Sequence[Piece]], places: Sequence[Place], cost: Callable[[Matrix], int]
) -> Iterator[Task]:
    """A worker for every matrix: the costliest first, each to the rank with the least to do (Graham 1969, section 5).

    So no rank has more than 4/3 of what it had under the best of plans. Of ranks with equally little to do it is the
    one that holds most of the matrix.
    """
    loads = dict.fromkeys(places, 0)
    for matrix in sorted(pieces, key=lambda matrix: (-cost(matrix), matrix)):
        held: Counter[Place] = Counter()
        for piece in pieces[matrix]:
            held[piece.place] += piece.numel
        worker = min(places, key=lambda place: (loads[place], -held[place], place))
        loads[worker] += cost(matrix)
        yield Task(matrix, worker, tuple(pieces[matrix]))


def in_rounds(tasks: Sequence[Task], num_elements: int) -> Iterator[tuple[Task, ...]]:
    """The tasks in their order, as many at a time as leave every buffer of every rank within ``num_elements``.

    A buffer that one task fills beyond that holds nothing else.
    """
    begin, loads = 0, Counter[tuple[str, Place]]()
    for number, task in enumerate(tasks):
        own = _buffers(task)
        if any(loads[buffer] and loads[buffer] + size > num_elements for buffer, size in own.items()):
            yield tuple(tasks[begin:number])
            begin = number
            loads.clear()
        loads.update(own)
    if begin < len(tasks):
        yield tuple(tasks[begin:])


def _buffers(task: Task) -> Counter[tuple[str, Place]]:
    """Elements of the task in the buffers of ranks: the holders' and the worker's, and where those between change over
    from ``shards`` to ``tp``, on the way there and back."""
    worker, sizes = task.worker, Counter[tuple[str, Place]]()
    for piece in task.pieces:
        sizes["held", piece.place] += piece.numel
        sizes["there", Place(worker.shard, piece.place.tp)] += piece.numel
        sizes["back", Place(piece.place.shard, worker.tp)] += piece.numel
        sizes["whole", worker] += piece.numel
    return sizes
