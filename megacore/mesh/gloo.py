"""Collectives on gloo, composed from the two of its primitives that are fast: all_to_all_single and messages.

Sums are taken element by element in the order of the ranks, with one rounding for 16-bit floats. So a result is the
same bit for bit on all ranks, from run to run, for every size of tensor and bucket, and a reduce-scatter is exactly
a slice of an all-reduce: sharded and unsharded runs can be compared bitwise.
gloo's own ring promises the first two of these, not the others.

gloo's time / ours, of the best and (of the median) of 15 alternating calls, geometric means over fp32, fp64 and bf16;
torch 2.13, two cores shared with other work, so the ratios are rough; `python benchmarks/collectives.py` repeats it:

| tensor | ranks | all_reduce | all_gather | reduce_scatter |
|---|---|---|---|---|
| 16 KiB | 2 | 1.1 (0.8) | 0.8 (1.1) | 1.3 (1.2) |
| 256 KiB | 2 | 0.9 (0.9) | 0.9 (0.9) | 1.2 (1.2) |
| 4096 KiB | 2 | 0.8 (0.7) | 0.7 (0.9) | 1.8 (1.8) |
| 16384 KiB | 2 | 0.9 (1.1) | 1.0 (0.9) | 2.0 (1.8) |
| 16 KiB | 4 | 2.0 (2.1) | 1.8 (1.5) | 3.4 (2.8) |
| 256 KiB | 4 | 1.2 (1.7) | 2.2 (1.3) | 2.1 (1.9) |
| 4096 KiB | 4 | 1.0 (0.9) | 1.5 (1.0) | 3.2 (1.9) |
| 16384 KiB | 4 | 0.8 (0.7) | 1.2 (0.9) | 1.9 (2.0) |

Between 2 ranks gloo's own all-reduce is used: a sum of two numbers is the same in any order.
With messages alone (send and recv for everything) small tensors between 2 ranks had worse medians on busy cores.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, distributed
from torch.distributed import Work

from megacore.mesh.group import Group, Message, Pending

# Up to here an all-reduce sends the whole tensor to all and each rank sums for itself: one message delay, not two.
SMALL_BYTES = 1 << 18
# Up to here an all-gather repeats its input for all_to_all_single: on busy cores faster than messages up to 2 MiB;
# at 16 MiB messages were. The switch lies between and was not tuned.
REPEAT_BYTES = 1 << 22
# Messages between stages have tags above those of collectives (`Group.next_tag`), which may use the same handle.
MESSAGE_TAGS = 1 << 30
REDUCE = MappingProxyType({"sum": distributed.ReduceOp.SUM, "max": distributed.ReduceOp.MAX})
COMBINE: Mapping[str, Callable[..., Tensor]] = MappingProxyType({"sum": torch.add, "max": torch.maximum})


def all_reduce(x: Tensor, group: Group, op: str) -> Pending:
    """Contiguous x, any shape, becomes the sum or maximum over the group, in place."""
    flat = x.view(-1)
    if group.size == 2:  # a sum of two has no order: gloo's own gives the same bits, sooner
        work = distributed.all_reduce(flat, REDUCE[op], group=group.handle, async_op=True)
        assert work is not None, "asynchronous calls give their work"
        return after(work, lambda: x)
    if x.numel() * x.element_size() <= SMALL_BYTES:
        received, work = swap(flat.repeat(group.size), [x.numel()] * group.size, [x.numel()] * group.size, group)
        return after(work, lambda: fold(received.view(group.size, -1), op, flat).view(x.shape))
    tag = group.next_tag()
    slices = flat.tensor_split(group.size)
    own = slices[group.rank]
    received, work = swap(flat, [piece.numel() for piece in slices], [own.numel()] * group.size, group)

    def finish() -> Tensor:
        work.wait()
        fold(received.view(group.size, -1), op, own)
        # Messages bear the tag of their collective: ranks may wait for several collectives in different orders.
        wait_all(send_to_all(own, slices, group, tag))
        return x

    return Pending(finish)


def all_gather(x: Tensor, group: Group, dim: int, sizes: Sequence[int], out: Tensor | None = None) -> Pending:
    """Rank r's [.., sizes[r], ..] to [.., sum(sizes), ..] along `dim` on all ranks."""
    outer, inner = x.shape[:dim], x.shape[dim + 1 :]
    flat = x.contiguous().view(-1)
    counts = [math.prod(outer) * size * math.prod(inner) for size in sizes]
    received = x.new_empty(sum(counts)) if out is None else out.view(-1)
    works: Sequence[Work]
    if received.nbytes <= REPEAT_BYTES:
        works = [swap(flat.repeat(group.size), [flat.numel()] * group.size, counts, group, received)[1]]
    else:
        parts = received.split(counts)
        if parts[group.rank].data_ptr() != flat.data_ptr():
            parts[group.rank].copy_(flat)
        works = send_to_all(flat, parts, group, group.next_tag())

    def finish() -> Tensor:
        wait_all(works)
        if out is not None:
            return out
        if math.prod(outer) == 1:  # the parts lie one behind the other
            return received.view(*outer, sum(sizes), *inner)
        return torch.cat([part.view(*outer, size, *inner) for part, size in zip(received.split(counts), sizes)], dim)

    return Pending(finish)


def reduce_scatter(x: Tensor, group: Group, dim: int, sizes: Sequence[int], out: Tensor | None = None) -> Pending:
    """[.., sum(sizes), ..] along `dim` to the sum over the group of rank r's [.., sizes[r], ..]."""
    pieces = x.split(list(sizes), dim)
    own = x.new_empty(pieces[group.rank].shape) if out is None else out
    flat = x.contiguous().view(-1) if dim == 0 else torch.cat([piece.reshape(-1) for piece in pieces])
    received, work = swap(flat, [piece.numel() for piece in pieces], [own.numel()] * group.size, group)

    def finish() -> Tensor:
        work.wait()
        fold(received.view(group.size, -1), "sum", own.view(-1))
        return own

    return Pending(finish)


def all_to_all(x: Tensor, group: Group, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Pending:
    """Rows for rank 0, 1, ... (send_sizes of them) to rows from rank 0, 1, ... (receive_sizes of them)."""
    received, work = swap(x.contiguous(), send_sizes, receive_sizes, group)
    return after(work, lambda: received)


def broadcast(x: Tensor, group: Group, source: int) -> None:
    """Contiguous x of the group's rank `source` to all, in place."""
    distributed.broadcast(x, group=group.handle, group_src=source)


def exchange(sends: Sequence[Message], receives: Sequence[Message], group: Group) -> list[Pending]:
    """Posts messages; receives first, so that what is on its way already finds its place."""
    assert group.handle is not None
    arriving = [group.handle.recv([m.tensor], m.peer, MESSAGE_TAGS + m.tag) for m in receives]
    leaving = [group.handle.send([m.tensor], m.peer, MESSAGE_TAGS + m.tag) for m in sends]
    return [
        after(work, partial(_same, m.tensor)) for work, m in zip(leaving + arriving, (*sends, *receives), strict=True)
    ]


def _same(x: Tensor) -> Tensor:
    return x


def swap(
    x: Tensor, sends: Sequence[int], receives: Sequence[int], group: Group, received: Tensor | None = None
) -> tuple[Tensor, Work]:
    """Starts gloo's all-to-all of contiguous rows: sends[p] of x to rank p, receives[p] from it into ``received``."""
    if received is None:
        received = x.new_empty([sum(receives), *x.shape[1:]])
    work = distributed.all_to_all_single(received, x, list(receives), list(sends), group=group.handle, async_op=True)
    assert work is not None
    return received, work


def send_to_all(x: Tensor, parts: Sequence[Tensor], group: Group, tag: int) -> list[Work]:
    """Starts sending x to every other rank and receiving parts[p] from each; all are contiguous."""
    assert group.handle is not None
    works = []
    # Each rank begins with its right neighbour, so that no rank is everybody's first target.
    for step in range(1, group.size):
        target, origin = (group.rank + step) % group.size, (group.rank - step) % group.size
        if parts[origin].numel():
            works.append(group.handle.recv([parts[origin]], origin, tag))
        if x.numel():
            works.append(group.handle.send([x], target, tag))
    return works


def after(work: Work, result: Callable[[], Tensor]) -> Pending:
    """A collective that is over when `work` is, its result still to be computed."""

    def finish() -> Tensor:
        work.wait()
        return result()

    return Pending(finish)


def wait_all(works: Sequence[Work]) -> None:
    """Returns when every message has been sent or received."""
    for work in works:
        work.wait()


def fold(parts: Tensor, op: str, out: Tensor) -> Tensor:
    """Combines the rows of parts [t, n], in order, into out [n]. `parts` is overwritten; 16-bit sums are float32."""
    combine, rows = COMBINE[op], parts.unbind()
    # One addition of two 16-bit floats is rounded once anyway.
    if op == "sum" and out.dtype in (torch.bfloat16, torch.float16) and len(rows) > 2:
        total = rows[0].float()
        for row in rows[1:]:
            total += row
        return out.copy_(total)
    for row in rows[1:-1]:
        combine(rows[0], row, out=rows[0])
    return combine(rows[0], rows[-1], out=out)
