"""Messages between the ranks of a group: they meet by name, whatever order their ends are posted in."""

import torch
from torch import Tensor

from megacore.layout.layout import Layout
from megacore.mesh.group import CommLog, Message
from megacore.mesh.mesh import ParallelMesh
from megacore.mesh.messages import exchange_start, swap
from tests.pool import WorkerPool

CPU = torch.device("cpu")


def number(rank: int, tag: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(5, dtype=torch.float64).add(100 * rank + tag).to(dtype)


def everybody_to_everybody(rank: int, size: int) -> None:
    log = CommLog()
    pp = ParallelMesh.build(Layout(pp=size), rank, CPU, log=log).pp
    others = [peer for peer in range(size) if peer != rank]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        tags = range(6)
        sends = [Message(number(rank, tag, dtype), peer, tag) for tag in tags for peer in others]
        receives = [Message(torch.empty(5, dtype=dtype), peer, tag) for tag in reversed(tags) for peer in others]
        pending = exchange_start(sends, receives, pp)
        arrived = [each.wait() for each in pending[len(sends) :]]
        for message, tensor in zip(receives, arrived, strict=True):
            assert tensor is message.tensor
            assert torch.equal(tensor, number(message.peer, message.tag, dtype)), (dtype, message.peer, message.tag)
        for each in pending[: len(sends)]:
            each.wait()
    assert log.totals() == {("pp", "send"): 3 * 6 * len(others)}


def test_messages_meet_by_name(pool: WorkerPool) -> None:
    for size in (2, 3):
        pool.run(everybody_to_everybody, size, size)


def swap_ends(rank: int) -> None:
    pp = ParallelMesh.build(Layout(pp=3), rank, CPU).pp
    if rank != 1:
        x = torch.full((2, 3), float(rank)).t()
        assert torch.equal(swap(x, 2 - rank, 7, pp), torch.full((3, 2), 2.0 - rank))
        assert torch.equal(x, torch.full((3, 2), float(rank)))


def test_two_ranks_swap_while_the_third_does_not_care(pool: WorkerPool) -> None:
    pool.run(swap_ends, 3)
