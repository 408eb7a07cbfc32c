"""Collectives on gloo, most of them composed from one primitive: an exchange of messages between all ranks.

Sums are taken element by element in the order of the ranks, with one rounding for 16-bit floats. So a result is the
same bit for bit on all ranks, from run to run, for every size of tensor and bucket, and a reduce-scatter is exactly
a slice of an all-reduce: sharded and unsharded runs can be compared bitwise.
gloo's own ring promises the first two of these, not the others.

gloo's time / ours, of the best and (of the median) of 15 alternating calls, geometric means over fp32, fp64 and bf16.
torch 2.13 on two cores that were busy with other work, so medians say little; `python benchmarks/collectives.py` measures
again:

| tensor | ranks | all_reduce | all_gather | reduce_scatter |
|---|---|---|---|---|
| 16 KiB | 2 | 1.4 (0.2) | 1.0 (0.2) | 1.6 (0.9) |
| 256 KiB | 2 | 0.8 (0.5) | 1.4 (0.7) | 1.6 (0.6) |
| 4096 KiB | 2 | 0.9 (0.7) | 1.2 (1.0) | 2.1 (1.8) |
| 16384 KiB | 2 | 1.1 (1.1) | 1.1 (1.1) | 2.3 (2.7) |
| 16 KiB | 4 | 1.8 (1.4) | 1.6 (0.9) | 2.6 (1.9) |
| 256 KiB | 4 | 1.5 (1.6) | 1.2 (1.4) | 1.9 (2.3) |
| 4096 KiB | 4 | 1.0 (1.0) | 1.4 (1.1) | 2.7 (2.1) |
| 16384 KiB | 4 | 1.0 (0.7) | 1.1 (0.8) | 1.7 (1.7) |

gloo's own all_to_all is the faster one and is used as it is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType

import torch
from torch import Tensor, distributed
from torch.distributed import Work

from megacore.mesh.group import Group, Pending

# Up to here every rank sends its whole tensor to all others and each sums for itself: one message delay, not two.
SMALL_BYTES = 1 << 18
COMBINE: Mapping[str, Callable[..., Tensor]] = MappingProxyType({"sum": torch.add, "max": torch.maximum})


def all_reduce(x: Tensor, group: Group, op: str) -> Pending:
    """Contiguous x, any shape, becomes the sum or maximum over the group, in place."""
    flat = x.view(-1)
    if x.numel() * x.element_size() <= SMALL_BYTES:
        return _all_reduce_small(x, flat, group, op)
    tag = group.next_tag()
    slices = list(flat.tensor_split(group.size))
    own = slices[group.rank]
    parts = [own if peer == group.rank else torch.empty_like(own) for peer in range(group.size)]
    first = exchange(slices, parts, group, tag)

    def finish() -> Tensor:
        wait_all(first)
        fold(parts, group.rank, op, own)
        # The same tag again is safe: messages of one tag between two ranks arrive in order.
        wait_all(exchange([own] * group.size, slices, group, tag))
        return x

    return Pending(finish)


def _all_reduce_small(x: Tensor, flat: Tensor, group: Group, op: str) -> Pending:
    parts = [flat if peer == group.rank else torch.empty_like(flat) for peer in range(group.size)]
    works = exchange([flat] * group.size, parts, group, group.next_tag())

    def finish() -> Tensor:
        wait_all(works)
        fold(parts, group.rank, op, flat)
        return x

    return Pending(finish)


def all_gather(x: Tensor, group: Group, dim: int, sizes: Sequence[int]) -> Pending:
    """Rank r's [.., sizes[r], ..] to [.., sum(sizes), ..] along `dim` on all ranks."""
    shape = list(x.shape)
    shape[dim] = sum(sizes)
    x = x.contiguous()
    whole = x.new_empty(shape)
    if math.prod(shape[:dim]) == 1:  # the parts lie one behind the other: receive them in place
        offsets = [0, *accumulate(sizes)]
        parts = [whole.narrow(dim, start, size) for start, size in zip(offsets, sizes)]
        parts[group.rank].copy_(x)
    else:
        parts = [x.new_empty([*x.shape[:dim], size, *x.shape[dim + 1 :]]) for size in sizes]
        parts[group.rank] = x
    works = exchange([x] * group.size, parts, group, group.next_tag())

    def finish() -> Tensor:
        wait_all(works)
        return whole if math.prod(shape[:dim]) == 1 else torch.cat(parts, dim, out=whole)

    return Pending(finish)


def reduce_scatter(x: Tensor, group: Group, dim: int, sizes: Sequence[int]) -> Pending:
    """[.., sum(sizes), ..] along `dim` to the sum over the group of rank r's [.., sizes[r], ..]."""
    pieces = [piece.contiguous() for piece in x.split(list(sizes), dim)]
    own = pieces[group.rank]
    parts = [own if peer == group.rank else torch.empty_like(own) for peer in range(group.size)]
    works = exchange(pieces, parts, group, group.next_tag())

    def finish() -> Tensor:
        wait_all(works)
        return fold(parts, group.rank, "sum", torch.empty_like(own))

    return Pending(finish)


def all_to_all(x: Tensor, group: Group, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Pending:
    """Rows for rank 0, 1, ... (send_sizes of them) to rows from rank 0, 1, ... (receive_sizes of them)."""
    x = x.contiguous()
    received = x.new_empty([sum(receive_sizes), *x.shape[1:]])
    work = distributed.all_to_all_single(
        received, x, list(receive_sizes), list(send_sizes), group=group.handle, async_op=True
    )
    assert work is not None

    def finish() -> Tensor:
        work.wait()
        return received

    return Pending(finish)


def broadcast(x: Tensor, group: Group, source: int) -> None:
    """Contiguous x of the group's rank `source` to all, in place."""
    distributed.broadcast(x, group=group.handle, group_src=source)


def exchange(sends: Sequence[Tensor], receives: Sequence[Tensor], group: Group, tag: int) -> list[Work]:
    """Starts sending sends[p] to every other rank p and receiving receives[p] from it; all are contiguous."""
    assert group.handle is not None
    works = []
    # Each rank begins with its right neighbour, so that no rank is everybody's first target.
    for step in range(1, group.size):
        target, origin = (group.rank + step) % group.size, (group.rank - step) % group.size
        if receives[origin].numel():
            works.append(group.handle.recv([receives[origin]], origin, tag))
        if sends[target].numel():
            works.append(group.handle.send([sends[target]], target, tag))
    return works


def wait_all(works: Sequence[Work]) -> None:
    """Returns when every message has been sent or received."""
    for work in works:
        work.wait()


def fold(parts: Sequence[Tensor], own: int, op: str, out: Tensor) -> Tensor:
    """Combines parts[0], parts[1], ... in this order into `out`, which may be parts[own] itself.

    The other parts are scratch and overwritten; 16-bit floats are summed in float32.
    """
    combine = COMBINE[op]
    # One addition of two 16-bit floats is rounded once anyway.
    if op == "sum" and out.dtype in (torch.bfloat16, torch.float16) and len(parts) > 2:
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return out.copy_(total)
    total = parts[0]
    scratch = parts[1] if own == 0 else parts[0]
    for part in parts[1:-1]:
        total = combine(total, part, out=scratch)
    return combine(total, parts[-1], out=out)
