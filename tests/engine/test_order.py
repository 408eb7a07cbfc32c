"""Ranks say the same to each other in the same order: per communicator the same collectives on all of its ranks, of
messages both ends, and between communicators no circle in which each rank waits for another."""

from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

import pytest

from megacore.config.schema import RunConfig
from megacore.mesh.group import CommLog
from tests.engine.common import built_rank, run_config, step_of
from tests.pool import WorkerPool

Communicator = tuple[int, ...]


class Said(NamedTuple):
    communicator: Communicator
    operation: str
    num_bytes: int
    stream: str
    axis: str = ""
    peer: int = -1


def said_by_rank(rank: int, world_size: int, config: RunConfig) -> list[Said]:
    log = CommLog(receives=True)
    built = built_rank(rank, world_size, config, log)
    for step in (1, 2):
        step_of(built, step, config.optim.lr)
    built.storage.arrive()
    said = []
    for each in log:
        ranks = getattr(built.mesh, each.axis).ranks
        peer = ranks[each.peer] if each.peer >= 0 else -1
        said.append(Said(ranks, each.operation, each.num_bytes, each.stream, each.axis, peer))
    return said


def disagreement(logs: list[list[Said]]) -> str:
    """What is wrong between the ranks' logs, or nothing."""
    for communicator in sorted({each.communicator for log in logs for each in log}):
        if len({tuple(collectives(logs[rank], communicator)) for rank in communicator}) > 1:
            return f"the ranks of {communicator} call different collectives"
    for (sender, receiver), sizes in messages(logs, "send").items():
        if messages(logs, "receive").get((sender, receiver)) != sizes:
            return f"what {sender} sends and {receiver} receives differs"
    if messages(logs, "receive").keys() != messages(logs, "send").keys():
        return "somebody receives what nobody sends"
    return circle(logs)


def collectives(log: list[Said], communicator: Communicator) -> list[Said]:
    """Of one communicator. What a rank brings to an all-to-all is its own affair."""
    own = [each for each in log if each.communicator == communicator and each.peer < 0]
    return [each._replace(num_bytes=0) if each.operation == "all_to_all" else each for each in own]


def messages(logs: list[list[Said]], operation: str) -> dict[tuple[int, int], list[int]]:
    """Sizes by (sender, receiver), in order."""
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank, log in enumerate(logs):
        for each in log:
            if each.operation == operation:
                pair = (rank, each.peer) if operation == "send" else (each.peer, rank)
                found[pair].append(each.num_bytes)
    return found


def circle(logs: list[list[Said]]) -> str:
    """Whether collectives could wait for each other for ever if each blocked until all of its ranks have come."""
    graph: TopologicalSorter[tuple[Communicator, int]] = TopologicalSorter()
    for log in logs:
        number: dict[Communicator, int] = defaultdict(int)
        before: list[tuple[Communicator, int]] = []
        for each in log:
            if each.peer < 0:
                node = each.communicator, number[each.communicator]
                number[each.communicator] += 1
                graph.add(node, *before)
                before = [node]
    try:
        graph.prepare()
    except CycleError as error:
        return f"a circle: {error.args[1]}"
    return ""


LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp2 zero1": (2, ("parallel.zero=1",)),
    "dp2 zero3 muon": (2, ("parallel.zero=3", "optim.name=muon")),
    "tp2 dp2 zero2": (4, ("parallel.tp=2", "parallel.zero=2", "parallel.recompute=full")),
    "pp2 dp2 zero3": (4, ("parallel.pp=2", "parallel.zero=3", "model.tie_embeddings=true")),
}
MORE: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp2": (2, ()),
    "tp2 sequence": (2, ("parallel.tp=2", "parallel.sequence_parallel=true")),
    "pp2 tp2 zb-v": (4, ("parallel.pp=2", "parallel.tp=2", "parallel.schedule=zb-v", "model.num_layers=6")),
    "hybrid": (4, ("parallel.zero=3", "parallel.dp_shard=2")),
    "pp2 tp2 dp2": (8, ("parallel.pp=2", "parallel.tp=2", "parallel.zero=1", "model.tie_embeddings=true")),
    "pp2 tp2 dp2 zero3": (8, ("parallel.pp=2", "parallel.tp=2", "parallel.zero=3", "parallel.schedule=zb-h1")),
    "pp4 dp2 dualpipe": (
        8,
        ("parallel.pp=4", "parallel.schedule=dualpipe-v", "parallel.zero=2", "model.num_layers=8"),
    ),
    "pp2 interleaved fp16": (
        4,
        ("parallel.pp=2", "parallel.chunks=3", "precision.dtype=fp16", "model.num_layers=6", "parallel.zero=1"),
    ),
    "tp4 bf16": (4, ("parallel.tp=4", "precision.dtype=bf16", "model.num_kv_heads=1", "optim.name=adafactor")),
    "tp2 dp2 statistics": (4, ("parallel.tp=2", "log.statistics_every=1", "optim.clip=adagc")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_logs_of_a_groups_ranks_are_equal(pool: WorkerPool, name: str) -> None:
    check(pool, *LAYOUTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_of_larger_layouts_too(pool: WorkerPool, name: str) -> None:
    check(pool, *MORE[name])


def check(pool: WorkerPool, world_size: int, overrides: tuple[str, ...]) -> None:
    config = run_config(world_size, "model.num_layers=4", "train.global_batch_size=16", *overrides)
    logs = pool.run(said_by_rank, world_size, world_size, config)
    assert all(logs), "every rank has something to say"
    assert {each.stream for log in logs for each in log} == {"host"}
    assert not (problem := disagreement(logs)), problem


PAIR, OTHERS = (0, 1), (2, 3)
SUM, GATHER = Said(PAIR, "all_reduce", 8, "host", "tp"), Said(PAIR, "all_gather", 64, "host", "tp")
SEND, RECEIVE = Said(PAIR, "send", 32, "host", "pp", 1), Said(PAIR, "receive", 32, "host", "pp", 0)


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        ([[SUM, SEND, GATHER], [SUM, GATHER, RECEIVE]], ""),
        ([[SUM, GATHER], [GATHER, SUM]], "different collectives"),
        ([[SUM, GATHER], [SUM]], "different collectives"),
        ([[SUM], [SUM._replace(num_bytes=16)]], "different collectives"),
        ([[SUM], [SUM._replace(stream="cuda 1")]], "different collectives"),
        ([[SEND], []], "0 sends and 1 receives"),
        ([[SEND], [RECEIVE._replace(num_bytes=4)]], "0 sends and 1 receives"),
        ([[], [RECEIVE]], "nobody sends"),
        (
            [
                [SUM, SUM._replace(communicator=(0, 2))],
                [SUM._replace(communicator=(1, 3)), SUM],
                [SUM._replace(communicator=(0, 2)), SUM._replace(communicator=OTHERS)],
                [SUM._replace(communicator=OTHERS), SUM._replace(communicator=(1, 3))],
            ],
            "a circle",
        ),
    ],
)
def test_what_differs_is_found(logs: list[list[Said]], expected: str) -> None:
    problem = disagreement(logs)
    assert expected in problem and bool(expected) == bool(problem)
