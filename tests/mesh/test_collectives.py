"""Collectives against what they mean, for sizes on both sides of the switch, ragged slices and every dim."""

import pytest
import torch
from torch import Tensor

from megacore.layout.layout import Layout
from megacore.mesh import collectives as c
from megacore.mesh.gloo import REPEAT_BYTES, SMALL_BYTES
from megacore.mesh.group import CommLog, CommRecord, Group
from megacore.mesh.mesh import ParallelMesh
from tests.pool import JobFailed, WorkerPool

CPU = torch.device("cpu")


def group_of(rank: int, size: int, log: CommLog | None = None) -> Group:
    return ParallelMesh.build(Layout(tp=size), rank, CPU, log=log).tp


def tensor_of(rank: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Any rank can make any other rank's tensor."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


def sum_in_order(tensors: list[Tensor]) -> Tensor:
    total = tensors[0].float() if tensors[0].dtype in (torch.bfloat16, torch.float16) else tensors[0].clone()
    for x in tensors[1:]:
        total += x
    return total.to(tensors[0].dtype)


def reduce_all_kinds(rank: int, size: int) -> None:
    group = group_of(rank, size)
    beyond = SMALL_BYTES // 2 + 7  # elements: beyond the switch for every dtype, and no multiple of any size
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64):
        for shape in ((), (1,), (3, 5), (beyond,)):
            tensors = [(8 * tensor_of(r, *shape)).to(dtype) for r in range(size)]
            x = tensors[rank].clone()
            assert c.all_reduce(x, group) is x
            assert torch.equal(x, sum_in_order(tensors)), (dtype, shape)
            x = tensors[rank].clone()
            assert torch.equal(c.all_reduce(x, group, "max"), torch.stack(tensors).amax(0)), (dtype, shape)
            if shape:
                x = tensors[rank].clone()
                other = c.reduce_scatter(x, group, 0, slices(shape[0], size))
                assert torch.equal(other, sum_in_order(tensors).split(slices(shape[0], size))[rank]), (dtype, shape)
                assert torch.equal(x, tensors[rank]), "the input stays as it was"


def slices(length: int, size: int) -> list[int]:
    """Ragged on purpose: the last rank gets the rest, which may be all."""
    return [length // (size + 1)] * (size - 1) + [length - length // (size + 1) * (size - 1)]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_are_those_in_order_of_ranks_bit_for_bit(pool: WorkerPool, size: int) -> None:
    pool.run(reduce_all_kinds, size, size)


def into_place(rank: int, size: int) -> None:
    group = group_of(rank, size)
    for length in (5, REPEAT_BYTES // 8 // size + 3):  # of a rank's part, on both sides of the switch
        parts = [tensor_of(r, length) for r in range(size)]
        for whole, part in in_and_out_of_place(parts, rank):
            pending = c.all_gather_start(part, group, out=whole)
            assert pending.wait() is whole and torch.equal(whole, torch.cat(parts))
        terms = [tensor_of(10 + r, length * size) for r in range(size)]
        x, expected = terms[rank].clone(), sum_in_order(terms).split(length)[rank]
        for own in (torch.zeros(length, dtype=x.dtype), x.split(length)[rank]):
            pending = c.reduce_scatter_start(x, group, out=own)
            assert pending.wait() is own and torch.equal(own, expected)


def in_and_out_of_place(parts: list[Tensor], rank: int) -> list[tuple[Tensor, Tensor]]:
    """(result's place, own part): apart, and the part where the result wants it."""
    whole = torch.zeros_like(torch.cat(parts))
    own = whole.split(len(parts[0]))[rank]
    own.copy_(parts[rank])
    return [(torch.zeros_like(whole), parts[rank]), (whole, own)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_results_are_put_where_they_are_wanted(pool: WorkerPool, size: int) -> None:
    pool.run(into_place, size, size)


def reduce_strided(rank: int, size: int) -> None:
    tensors = [tensor_of(r, 6, 4) for r in range(size)]
    base = tensors[rank].clone()
    view = base[:, 1:3]
    assert c.all_reduce(view, group_of(rank, size)) is view
    assert torch.equal(view, sum_in_order(tensors)[:, 1:3])
    assert torch.equal(base[:, 0], tensors[rank][:, 0])


def test_a_view_is_reduced_in_place(pool: WorkerPool) -> None:
    pool.run(reduce_strided, 2, 2)


def gather_all_kinds(rank: int, size: int) -> None:
    group = group_of(rank, size)
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool):
        for dim in (0, 1, 2, -1):
            whole = (8 * tensor_of(7, *(3, size, 4) if dim == 1 else (2 * size, 3, 2 * size))).to(dtype)
            for sizes in (None, slices(whole.shape[dim], size)):
                own = whole.split(sizes or whole.shape[dim] // size, dim)[rank]
                assert torch.equal(c.all_gather(own, group, dim, sizes), whole), (dtype, dim, sizes)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_gathering_restores_the_whole(pool: WorkerPool, size: int) -> None:
    pool.run(gather_all_kinds, size, size)


def gather_large(rank: int, size: int) -> None:
    group = group_of(rank, size)
    rows = REPEAT_BYTES // 8 // 4 + 5  # beyond the switch to messages
    for dim, shape in ((0, (rows, 4)), (1, (4, rows)), (1, (1, 4 * rows))):
        whole = tensor_of(7, *shape)
        for sizes in (slices(whole.shape[dim], size), [0] * (size - 1) + [whole.shape[dim]]):
            assert torch.equal(c.all_gather(whole.split(sizes, dim)[rank], group, dim, sizes), whole), (dim, sizes)


@pytest.mark.parametrize("size", [2, 3])
def test_gathering_large_tensors(pool: WorkerPool, size: int) -> None:
    pool.run(gather_large, size, size)


def scatter_dims(rank: int, size: int) -> None:
    group = group_of(rank, size)
    for dim in (0, 1, -1):
        tensors = [tensor_of(r, 2 * size, size, 3 * size) for r in range(size)]
        expected = sum_in_order(tensors).chunk(size, dim)[rank]
        assert torch.equal(c.reduce_scatter(tensors[rank], group, dim), expected)


def test_reduce_scatter_along_any_dim(pool: WorkerPool) -> None:
    pool.run(scatter_dims, 3, 3)


def exchange_rows(rank: int, size: int) -> None:
    group = group_of(rank, size)
    rows = torch.arange(size * 2).view(size * 2, 1) + 100 * rank
    expected = torch.cat([torch.arange(2 * rank, 2 * rank + 2) + 100 * r for r in range(size)])
    assert torch.equal(c.all_to_all(rows, group).view(-1), expected)
    sends = [rank + peer for peer in range(size)]  # rank 0 sends nothing to itself
    ragged = torch.cat([torch.full((n,), 10 * rank + peer) for peer, n in enumerate(sends)])
    received = c.all_to_all(ragged, group, sends, [rank + peer for peer in range(size)])
    assert torch.equal(received, torch.cat([torch.full((peer + rank,), 10 * peer + rank) for peer in range(size)]))


@pytest.mark.parametrize("size", [2, 4])
def test_all_to_all(pool: WorkerPool, size: int) -> None:
    pool.run(exchange_rows, size, size)


def overlap(rank: int, size: int) -> None:
    """Several collectives under way, waited for in another order on every rank."""
    group = group_of(rank, size)
    large = [tensor_of(r, SMALL_BYTES // 4) for r in range(size)]
    small = [tensor_of(r + 10, 6) for r in range(size)]
    pending = {
        "large": c.all_reduce_start(large[rank].clone(), group),
        "small": c.all_reduce_start(small[rank].clone(), group),
        "gather": c.all_gather_start(small[rank], group),
        "scatter": c.reduce_scatter_start(torch.cat(small), group),
    }
    results = {}
    for name in sorted(pending)[rank:] + sorted(pending)[:rank]:
        results[name] = pending[name].wait()
        assert pending[name].wait() is results[name]
    assert torch.equal(results["large"], sum_in_order(large))
    assert torch.equal(results["small"], sum_in_order(small))
    assert torch.equal(results["gather"], torch.cat(small))
    assert torch.equal(results["scatter"], sum_in_order([small[rank]] * size))


@pytest.mark.parametrize("size", [2, 4])
def test_pending_collectives_do_not_mix(pool: WorkerPool, size: int) -> None:
    pool.run(overlap, size, size)


def broadcast_and_objects(rank: int, size: int) -> list[str]:
    group = group_of(rank, size)
    x = tensor_of(rank, 4, 4)
    view = x[:, 1]
    assert c.broadcast(view, group, source=2) is view
    assert torch.equal(view, tensor_of(2, 4, 4)[:, 1])
    c.barrier(group)
    return c.gather_objects(f"rank {rank}", group)


def test_broadcast_and_objects(pool: WorkerPool) -> None:
    assert pool.run(broadcast_and_objects, 3, 3) == [["rank 0", "rank 1", "rank 2"]] * 3


def disagree(rank: int, size: int) -> str:
    group = group_of(rank, size)
    c.agree(None, group)
    try:
        c.agree(FileNotFoundError("corpus.bin") if rank == 1 else None, group)
    except (FileNotFoundError, c.PeerFailed) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def test_an_error_of_one_rank_reaches_all(pool: WorkerPool) -> None:
    others = "PeerFailed: rank 1 failed: FileNotFoundError: corpus.bin"
    assert pool.run(disagree, 3, 3) == [others, "FileNotFoundError: corpus.bin", others]


def logged(rank: int, size: int) -> CommLog:
    log = CommLog()
    group = group_of(rank, size, log)
    c.all_reduce(torch.zeros(2, 3), group)
    c.all_gather(torch.zeros(2, 3), group, 1)
    c.reduce_scatter(torch.zeros(2, 4), group, 1)
    c.all_to_all(torch.zeros(4), group)
    c.broadcast(torch.zeros(5, dtype=torch.int64), group)
    return log


def test_the_log_counts_each_collective_once_by_its_whole_tensor(pool: WorkerPool) -> None:
    logs = pool.run(logged, 2, 2)
    assert logs[0] == logs[1]
    assert [(record.operation, record.num_elements) for record in logs[0]] == [
        ("all_reduce", 6),
        ("all_gather", 12),
        ("reduce_scatter", 8),
        ("all_to_all", 4),
        ("broadcast", 5),
    ]
    assert logs[0][0] == CommRecord("tp", "all_reduce", 6, torch.float32)
    assert logs[0].totals()["tp", "all_gather"] == 1
    assert [record.wire_elements(2) for record in logs[0]] == [6.0, 6.0, 4.0, 2.0, 5.0]


def raise_on_shapes(rank: int, size: int) -> None:
    c.reduce_scatter(torch.zeros(7), group_of(rank, size))


def test_slices_that_do_not_fit_are_named(pool: WorkerPool) -> None:
    with pytest.raises(JobFailed, match=r"\(7,\) does not fall into 2 slices .* pad it"):
        pool.run(raise_on_shapes, 2, 2)
