"""Collectives among ranks that are not there: shapes as they would be, and a record of what would travel.

For dry runs: one process stands for any rank of any world. Tensors must be on the meta device, whose numbers nobody
reads, so a collective has nothing to do but to give its result a shape.
"""

from collections.abc import Sequence

from torch import Tensor

from megacore.mesh.group import Group, Message, Pending


def all_reduce(x: Tensor, group: Group, op: str) -> Pending:
    """x, any shape, as it is."""
    return Pending.done(x)


def all_gather(x: Tensor, group: Group, dim: int, sizes: Sequence[int], out: Tensor | None = None) -> Pending:
    """[.., sizes[rank], ..] to [.., sum(sizes), ..] along `dim`."""
    shape = [*x.shape[:dim], sum(sizes), *x.shape[dim + 1 :]]
    return Pending.done(x.new_empty(shape) if out is None else out)


def reduce_scatter(x: Tensor, group: Group, dim: int, sizes: Sequence[int], out: Tensor | None = None) -> Pending:
    """[.., sum(sizes), ..] along `dim` to [.., sizes[rank], ..]."""
    shape = [*x.shape[:dim], sizes[group.rank], *x.shape[dim + 1 :]]
    return Pending.done(x.new_empty(shape) if out is None else out)


def all_to_all(x: Tensor, group: Group, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Pending:
    """[sum(send_sizes), ..] to [sum(receive_sizes), ..]."""
    return Pending.done(x.new_empty([sum(receive_sizes), *x.shape[1:]]))


def broadcast(x: Tensor, group: Group, source: int) -> None:
    """x, any shape, stays as it is."""


def exchange(sends: Sequence[Message], receives: Sequence[Message], group: Group) -> list[Pending]:
    """All messages have arrived."""
    return [Pending.done(message.tensor) for message in (*sends, *receives)]
