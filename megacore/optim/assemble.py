"""Hands every matrix whole to one rank, which works on it, and its pieces back to the ranks that hold them.

A matrix is cut by tp and by ZeRO's shards at once. There is no group of all these ranks together, so messages go over
``shards`` first, to the shard of the rank that they are for, and then over its ``tp``. Each hop is one all-to-all for
all matrices of a round, there and back: four collectives a round, two where only one of the groups cuts, none where
neither does. Rounds are as many as keep buffers within their size.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megacore.mesh.collectives import all_to_all, gather_objects
from megacore.optim.deal import Piece, Place, Task, deal, in_rounds
from megacore.optim.matrices import view_of
from megacore.optim.rule import Share
from megacore.spec.matrices import Matrix, rectangles_of


class WholeMatrices:
    """The matrices of which the ranks of ``share`` hold runs, each dealt to one of them by its ``cost``.

    Pieces travel and matrices are worked on in ``dtype``. ``num_bytes`` bounds each of a rank's buffers (but for
    matrices that are larger alone), of which there are up to four at a time. Constructing it is collective over the
    share's groups.
    """

    def __init__(self, share: Share, dtype: torch.dtype, num_bytes: int, cost: Callable[[Matrix], int]) -> None:
        self.dtype = dtype
        self.rounds = [_Round(tasks, share) for tasks in plan(share, num_bytes // dtype.itemsize, cost)]

    def apply(self, tensors: Sequence[Tensor], work: Callable[[Matrix, Tensor], Tensor]) -> None:
        """Put ``work(matrix, values)`` in the place of every matrix; both are [rows, columns] of ``dtype``.

        ``tensors`` are 1-D, one per run, and written to. The result does not depend on how matrices are cut.
        """
        for each in self.rounds:
            each.apply(tensors, work, self.dtype)


def plan(share: Share, num_elements: int, cost: Callable[[Matrix], int]) -> list[tuple[Task, ...]]:
    """Who works on what, round by round: the same on all ranks, which must all call this."""
    places = [Place(shard, tp) for shard in range(share.shards.size) for tp in range(share.tp.size)]
    return list(in_rounds(list(deal(_pieces(share), places, cost)), num_elements))


class _Round:
    """The matrices that are assembled at the same time."""

    def __init__(self, tasks: Sequence[Task], share: Share) -> None:
        parts = [(task.worker, piece) for task in tasks for piece in task.pieces]
        self.there = _Route([_Parcel(p.place, worker, p) for worker, p in parts if p.rectangle.owned], share)
        self.back = _Route([_Parcel(worker, p.place, p) for worker, p in parts], share)
        self.device = share.device

    def apply(self, tensors: Sequence[Tensor], work: Callable[[Matrix, Tensor], Tensor], dtype: torch.dtype) -> None:
        leaving = torch.empty(_numel(self.there.outgoing), dtype=dtype, device=self.device)
        for piece, part in _unpacked(leaving, self.there.outgoing):
            part.copy_(view_of(piece.rectangle, tensors[piece.run]))
        arrived = _by_matrix(_unpacked(self.there.send(leaving), self.there.incoming))
        leaving = torch.empty(_numel(self.back.outgoing), dtype=dtype, device=self.device)
        for matrix, pieces in _by_matrix(_unpacked(leaving, self.back.outgoing)).items():
            values = leaving.new_empty(matrix.rows, matrix.columns)
            for piece, part in arrived.pop(matrix):
                _of_matrix(values, piece).copy_(part)
            result = work(matrix, values)
            for piece, part in pieces:
                part.copy_(_of_matrix(result, piece))
        for piece, part in _unpacked(self.back.send(leaving), self.back.incoming):
            view_of(piece.rectangle, tensors[piece.run]).copy_(part)


@dataclass(frozen=True)
class _Parcel:
    """A piece's elements on their way."""

    source: Place
    target: Place
    piece: Piece


class _Route:
    """How parcels get from all sources to all targets; ``parcels`` is one list, in one order, on all ranks.

    A rank packs ``outgoing`` one behind the other, and unpacks ``incoming`` in this order.
    """

    def __init__(self, parcels: Sequence[_Parcel], share: Share) -> None:
        self.shards, self.tp = share.shards, share.tp
        me = Place(share.shards.rank, share.tp.rank)
        outgoing = sorted((each for each in parcels if each.source == me), key=lambda each: each.target)
        incoming = [each for each in parcels if each.target == me]
        incoming.sort(key=lambda each: (each.source.tp, each.source.shard))
        self.outgoing, self.incoming = ([each.piece for each in own] for own in (outgoing, incoming))
        flow: Counter[tuple[Place, Place]] = Counter()
        for each in parcels:
            flow[each.source, each.target] += each.piece.numel
        shards, tps = range(share.shards.size), range(share.tp.size)

        def by_shard(source: int, target: int) -> int:
            return sum(flow[Place(source, me.tp), Place(target, tp)] for tp in tps)

        def by_tp(source: int, target: int) -> int:
            return sum(flow[Place(shard, source), Place(me.shard, target)] for shard in shards)

        self.first = [by_shard(me.shard, other) for other in shards], [by_shard(other, me.shard) for other in shards]
        self.second = [by_tp(me.tp, other) for other in tps], [by_tp(other, me.tp) for other in tps]
        # between the hops: parcels arrive by source, each source's by target, and leave by target
        self.between = [flow[Place(shard, me.tp), Place(me.shard, tp)] for shard in shards for tp in tps]
        self.order = [shard * len(tps) + tp for tp in tps for shard in shards]

    def send(self, x: Tensor) -> Tensor:
        """[elements of outgoing] to [elements of incoming]."""
        x = all_to_all(x, self.shards, *self.first)
        if self.shards.size > 1 and self.tp.size > 1:
            parts = x.split(self.between)
            x = torch.cat([parts[number] for number in self.order])
        return all_to_all(x, self.tp, *self.second)


def _pieces(share: Share) -> dict[Matrix, list[Piece]]:
    """Of every matrix its pieces on all ranks, the same on all of them."""
    own = list(zip(share.specs, share.runs))
    of_tp_ranks = gather_objects(gather_objects(own, share.shards), share.tp)
    pieces: defaultdict[Matrix, list[Piece]] = defaultdict(list)
    for tp, of_shards in enumerate(of_tp_ranks):
        for shard, runs in enumerate(of_shards):
            for number, (spec, run) in enumerate(runs):
                for rectangle in rectangles_of(spec, run, tp, share.tp.size):
                    pieces[rectangle.matrix].append(Piece(Place(shard, tp), number, rectangle))
    for matrix, parts in pieces.items():
        held = sum(piece.numel for piece in parts if piece.rectangle.owned)
        assert held == matrix.numel, f"{held} elements of {matrix} are held by somebody"
    return pieces


def _numel(pieces: Iterable[Piece]) -> int:
    return sum(piece.numel for piece in pieces)


def _unpacked(x: Tensor, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Tensor]]:
    """Each piece with its [height, width] view of a buffer in which they lie one behind the other."""
    for piece, part in zip(pieces, x.split([piece.numel for piece in pieces]), strict=True):
        yield piece, part.view(piece.rectangle.height, piece.rectangle.width)


def _by_matrix(parts: Iterable[tuple[Piece, Tensor]]) -> dict[Matrix, list[tuple[Piece, Tensor]]]:
    found: defaultdict[Matrix, list[tuple[Piece, Tensor]]] = defaultdict(list)
    for piece, part in parts:
        found[piece.rectangle.matrix].append((piece, part))
    return found


def _of_matrix(values: Tensor, piece: Piece) -> Tensor:
    """The piece's view of the whole matrix."""
    place = piece.rectangle
    return values[place.row : place.row + place.height, place.column : place.column + place.width]
