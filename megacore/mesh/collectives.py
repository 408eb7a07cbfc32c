"""Collectives over a group: one name for each, whatever the backend. A group of size 1 returns its input.

`[.., n, ..]` are shapes with the size along `dim` written out; t is the group's size. The ranks of a group must
call the same collectives in the same order. None of these is seen by autograd: `mesh/autograd.py` has those that are.
"""

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, distributed

from megacore.mesh import gloo, imagined, nccl
from megacore.mesh.group import IMAGINED, Group, Pending
from megacore.mesh.named import named

_BACKENDS = MappingProxyType({"gloo": gloo, "nccl": nccl, IMAGINED: imagined})


class PeerFailed(RuntimeError):
    """Another rank has failed; the message carries its error."""


class NotThere(RuntimeError):
    """Ranks that are only imagined were asked for what they know."""


def all_reduce(x: Tensor, group: Group, op: str = "sum") -> Tensor:
    """x, any shape, becomes its `sum` or `max` over the group, in place; returns x. Equal bit for bit on all ranks."""
    return all_reduce_start(x, group, op).wait()


def all_gather(x: Tensor, group: Group, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
    """[.., n, ..] of each rank to [.., t*n, ..] along `dim`, in order of ranks.

    `sizes` gives each rank's own n where they differ: [.., sizes[rank], ..] to [.., sum(sizes), ..].
    """
    return all_gather_start(x, group, dim, sizes).wait()


def reduce_scatter(x: Tensor, group: Group, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
    """[.., t*n, ..] to [.., n, ..]: the rank's own slice along `dim` of the sum over the group.

    `sizes` gives the slices where they differ: [.., sum(sizes), ..] to [.., sizes[rank], ..].
    """
    return reduce_scatter_start(x, group, dim, sizes).wait()


def all_reduce_start(x: Tensor, group: Group, op: str = "sum") -> Pending:
    """Begins `all_reduce`; x is not to be touched until `wait` returns it."""
    if group.size == 1:
        return Pending.done(x)
    group.record("all_reduce", x)
    bare = x.detach()
    if bare.is_contiguous():
        pending = _backend(group).all_reduce(bare, group, op)
    else:
        packed = _backend(group).all_reduce(bare.contiguous(), group, op)
        pending = packed.then(bare.copy_)
    return pending.then(lambda _: x)


def all_gather_start(
    x: Tensor, group: Group, dim: int = 0, sizes: Sequence[int] | None = None, out: Tensor | None = None
) -> Pending:
    """Begins `all_gather`. ``out`` (contiguous, dim 0 only) takes the result; x may be its own part of it."""
    _check_out(out, dim)
    if group.size == 1:
        return Pending.done(x if out is None else out.copy_(x))
    dim = dim % x.dim()
    sizes = [x.shape[dim]] * group.size if sizes is None else list(sizes)
    if len(sizes) != group.size or sizes[group.rank] != x.shape[dim]:
        raise ValueError(
            f"all_gather over {group.axis}: rank {group.rank} of {group.size} has {tuple(x.shape)}, which contradicts "
            f"sizes={sizes} along dim {dim}; give every rank's own size"
        )
    whole = math.prod(x.shape[:dim]) * sum(sizes) * math.prod(x.shape[dim + 1 :])
    group.record("all_gather", x, whole)
    return _backend(group).all_gather(x.detach(), group, dim, sizes, out)


def reduce_scatter_start(
    x: Tensor, group: Group, dim: int = 0, sizes: Sequence[int] | None = None, out: Tensor | None = None
) -> Pending:
    """Begins `reduce_scatter`; x is not to be written until `wait` returns.

    ``out`` (contiguous, dim 0 only) takes the result; it may be the rank's own slice of x.
    """
    _check_out(out, dim)
    if group.size == 1:
        return Pending.done(x if out is None else out.copy_(x))
    dim = dim % x.dim()
    sizes = [x.shape[dim] // group.size] * group.size if sizes is None else list(sizes)
    if len(sizes) != group.size or sum(sizes) != x.shape[dim]:
        raise ValueError(
            f"reduce_scatter over {group.axis}: {tuple(x.shape)} does not fall into {group.size} slices of "
            f"sizes={sizes} along dim {dim}; pad it to a multiple of {group.size} or give the sizes"
        )
    group.record("reduce_scatter", x)
    return _backend(group).reduce_scatter(x.detach(), group, dim, sizes, out)


def all_to_all(
    x: Tensor, group: Group, send_sizes: Sequence[int] | None = None, receive_sizes: Sequence[int] | None = None
) -> Tensor:
    """[t*n, ..], n rows for each rank in order, to [t*n, ..], n rows from each rank in order.

    Where counts differ: [sum(send_sizes), ..] to [sum(receive_sizes), ..]; rank r's send_sizes[p] must be rank p's
    receive_sizes[r].
    """
    if group.size == 1:
        return x
    equal = [x.shape[0] // group.size] * group.size
    sends = equal if send_sizes is None else list(send_sizes)
    receives = equal if receive_sizes is None else list(receive_sizes)
    if len(sends) != group.size or len(receives) != group.size or sum(sends) != x.shape[0]:
        raise ValueError(
            f"all_to_all over {group.axis}: {tuple(x.shape)} contradicts send_sizes={sends}, receive_sizes={receives} "
            f"between {group.size} ranks; give one size per rank, together the number of rows"
        )
    group.record("all_to_all", x)
    return _backend(group).all_to_all(x.detach(), group, sends, receives).wait()


def broadcast(x: Tensor, group: Group, source: int = 0) -> Tensor:
    """x, any shape, becomes that of the group's rank `source`, in place; returns x."""
    if group.size == 1:
        return x
    group.record("broadcast", x)
    bare = x.detach()
    if bare.is_contiguous():
        _backend(group).broadcast(bare, group, source)
    else:
        packed = bare.contiguous()
        _backend(group).broadcast(packed, group, source)
        bare.copy_(packed)
    return x


def barrier(group: Group) -> None:
    """Returns when all ranks of the group have called it."""
    if group.size > 1:
        distributed.barrier(group=group.handle)


def gather_objects(item: Any, group: Group) -> list[Any]:
    """One small picklable item of each rank, in order of ranks, on all ranks. For start-up and errors, not for data.

    Raises `NotThere` where the ranks are imagined.
    """
    if group.size == 1:
        return [item]
    if group.backend == IMAGINED:
        raise NotThere(f"what other ranks of {group.axis} know is not known")
    items: list[Any] = [None] * group.size
    distributed.all_gather_object(items, item, group=group.handle)
    return items


def agree(error: Exception | None, group: Group) -> None:
    """Returns if no rank of the group brings an error. Else every rank raises: its own error, or `PeerFailed`.

    For steps where one rank may fail while the others would wait for it (opening files, building an index).
    """
    errors = gather_objects(None if error is None else f"{type(error).__name__}: {error}", group)
    if error is not None:
        raise error
    for rank, text in zip(group.ranks, errors):
        if text is not None:
            raise PeerFailed(f"rank {rank} failed: {text}")


def _check_out(out: Tensor | None, dim: int) -> None:
    assert out is None or (dim == 0 and out.is_contiguous()), "results go in place along dim 0, without gaps"


def _backend(group: Group) -> Any:
    return named(_BACKENDS[group.backend], group)
