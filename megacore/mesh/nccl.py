"""Collectives on NCCL: its own ones.

Not yet run on a GPU. That an all-reduce gives all ranks the same bits, and the same ones from run to run while
algorithm (NCCL_ALGO, NCCL_PROTO) and topology stay, is expected of NCCL and remains to be tested.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, distributed
from torch.distributed import P2POp, ReduceOp

from megacore.mesh.group import Group, Message, Pending

OPS = MappingProxyType({"sum": ReduceOp.SUM, "max": ReduceOp.MAX})
# torch 2.13 renamed these two; older releases know only the second names.
_gather_equal = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter_equal = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


def all_reduce(x: Tensor, group: Group, op: str) -> Pending:
    """Contiguous x, any shape, becomes the sum or maximum over the group, in place."""
    return _pending(distributed.all_reduce(x, OPS[op], group=group.handle, async_op=True), lambda: x)


def all_gather(x: Tensor, group: Group, dim: int, sizes: Sequence[int], out: Tensor | None = None) -> Pending:
    """Rank r's [.., sizes[r], ..] to [.., sum(sizes), ..] along `dim` on all ranks."""
    x = x.contiguous()
    if len(set(sizes)) > 1:
        parts = [x.new_empty([*x.shape[:dim], size, *x.shape[dim + 1 :]]) for size in sizes]
        work = distributed.all_gather(parts, x, group=group.handle, async_op=True)
        return _pending(work, lambda: torch.cat(parts, dim, out=out))
    whole = x.new_empty([group.size, *x.shape]) if out is None else out.view(group.size, *x.shape)
    work = _gather_equal(whole, x, group=group.handle, async_op=True)
    if dim == 0:
        return _pending(work, lambda: whole.flatten(0, 1) if out is None else out)
    return _pending(work, lambda: torch.cat(whole.unbind(), dim))


def reduce_scatter(x: Tensor, group: Group, dim: int, sizes: Sequence[int], out: Tensor | None = None) -> Pending:
    """[.., sum(sizes), ..] along `dim` to the sum over the group of rank r's [.., sizes[r], ..]."""
    pieces = x.split(list(sizes), dim)
    own = torch.empty_like(pieces[group.rank], memory_format=torch.contiguous_format) if out is None else out
    if len(set(sizes)) > 1:
        parts = [piece.contiguous() for piece in pieces]
        work = distributed.reduce_scatter(own, parts, group=group.handle, async_op=True)
    else:
        whole = x.contiguous() if dim == 0 else torch.stack(pieces).flatten(0, 1)
        work = _reduce_scatter_equal(own, whole, group=group.handle, async_op=True)
    return _pending(work, lambda: own)


def all_to_all(x: Tensor, group: Group, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Pending:
    """Rows for rank 0, 1, ... (send_sizes of them) to rows from rank 0, 1, ... (receive_sizes of them)."""
    x = x.contiguous()
    received = x.new_empty([sum(receive_sizes), *x.shape[1:]])
    work = distributed.all_to_all_single(
        received, x, list(receive_sizes), list(send_sizes), group=group.handle, async_op=True
    )
    return _pending(work, lambda: received)


def broadcast(x: Tensor, group: Group, source: int) -> None:
    """Contiguous x of the group's rank `source` to all, in place."""
    distributed.broadcast(x, group=group.handle, group_src=source)


def exchange(sends: Sequence[Message], receives: Sequence[Message], group: Group) -> list[Pending]:
    """Posts messages as one group of NCCL calls."""
    calls = [P2POp(distributed.isend, m.tensor, group=group.handle, tag=m.tag, group_peer=m.peer) for m in sends]
    calls += [P2POp(distributed.irecv, m.tensor, group=group.handle, tag=m.tag, group_peer=m.peer) for m in receives]
    works = distributed.batch_isend_irecv(calls)
    if len(works) == 1:  # coalesced: one work stands for all
        works = works * len(calls)
    tensors = [m.tensor for m in (*sends, *receives)]
    return [_pending(work, partial(_same, tensor)) for work, tensor in zip(works, tensors, strict=True)]


def _same(x: Tensor) -> Tensor:
    return x


def _pending(work: distributed.Work | None, result: Callable[[], Tensor]) -> Pending:
    def finish() -> Tensor:
        assert work is not None
        work.wait()
        return result()

    return Pending(finish)
