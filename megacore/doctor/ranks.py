"""How fast each rank computes, and each pair of ranks talks: what names the bad node of a job before it starts.

Pairs are measured in the rounds of a tournament, in each of which every rank has one partner, so that n ranks need
n - 1 rounds and wires are as busy as in training.
"""

import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed

from megacore.doctor.finding import OK, WARN, Finding
from megacore.mesh.rank_info import RankInfo

SIZE = 512
"""Of the square matrices that are multiplied on a CPU; 8 times that on a GPU."""
REPEATS = 7
SMALL, LARGE = 64, 8 << 20
"""Bytes of a message whose latency, and whose bandwidth is measured."""
SLOW_RANK, SLOW_PAIR = 0.75, 0.5
"""Shares of the median below which a rank or a pair stands out."""
FEW, SLOW_AMONG_FEW = 4, 0.5
"""With fewer ranks than these, a median says little."""
MAX_SKEW_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True)
class Speeds:
    """One rank's figures; pairs by the partner's rank."""

    host: str
    tflops: float
    clock: float
    """Seconds since 1970, right after all ranks have met."""
    bandwidth: dict[int, float]
    """GB/s, both directions at once."""
    latency: dict[int, float]
    """Microseconds, one way."""


def measure(info: RankInfo, device: torch.device) -> list[Speeds]:
    """All ranks' figures, on all ranks, which must have met (``process_group.start``)."""
    if info.world_size > 1:
        distributed.barrier()
    clock = time.time()
    tflops = compute_speed(device)
    bandwidth: dict[int, float] = {}
    latency: dict[int, float] = {}
    for pairs in rounds(info.world_size):
        partner = next((b if a == info.rank else a for a, b in pairs if info.rank in (a, b)), None)
        if partner is not None:
            bandwidth[partner], latency[partner] = pair_speed(info.rank, partner, device)
        distributed.barrier()
    return gathered(Speeds(socket.gethostname(), tflops, clock, bandwidth, latency), info)


def gathered(own: T, info: RankInfo) -> list[T]:
    """What each rank has, by rank."""
    everyone = [own] * info.world_size
    if info.world_size > 1:
        distributed.all_gather_object(everyone, own)
    return everyone


def rounds(number: int) -> Iterator[list[tuple[int, int]]]:
    """Pairs (a < b) of ranks in rounds, each rank at most once in a round and with every other one in some (the circle
    method for round-robin tournaments)."""
    players = list(range(number + number % 2))  # an odd one out has a round off
    for _ in range(len(players) - 1 if number > 1 else 0):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]))
        yield sorted((min(a, b), max(a, b)) for a, b in pairs if max(a, b) < number)
        players = [players[0], players[-1], *players[1:-1]]


def compute_speed(device: torch.device) -> float:
    """TFLOP/s of a matrix product: bf16 on a GPU, fp32 on a CPU; the best of some."""
    size, dtype = (8 * SIZE, torch.bfloat16) if device.type == "cuda" else (SIZE, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(timed(lambda: a @ b, device) for _ in range(REPEATS))
    return float(2 * size**3 / best / 1e12)


def pair_speed(rank: int, partner: int, device: torch.device) -> tuple[float, float]:
    """(GB/s, one-way microseconds) with a partner, who calls this at the same time."""

    def exchange(out: torch.Tensor, back: torch.Tensor) -> None:
        ends = [distributed.P2POp(distributed.isend, out, partner), distributed.P2POp(distributed.irecv, back, partner)]
        for work in distributed.batch_isend_irecv(ends if rank < partner else ends[::-1]):
            work.wait()

    results = []
    for num_bytes in (LARGE, SMALL):
        out, back = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
        exchange(out, back)
        results.append(min(timed(lambda o=out, b=back: exchange(o, b), device) for _ in range(REPEATS)))  # type: ignore[misc]
    return LARGE / results[0] / 1e9, results[1] * 1e6


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds, the device's work included."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def judge(ranks: Sequence[Speeds]) -> Iterator[Finding]:
    """What stands out, by rank and host."""
    usual = statistics.median(each.tflops for each in ranks)
    least = (SLOW_RANK if len(ranks) >= FEW else SLOW_AMONG_FEW) * usual
    slow = [(rank, each) for rank, each in enumerate(ranks) if each.tflops < least]
    for rank, each in slow:
        text = f"rank {rank} on {each.host} computes at {each.tflops / usual:.0%} of the median"
        yield Finding("slow rank", WARN, text, f"look at {each.host}, or leave it out")
    if not slow:
        yield Finding("computing", OK, f"{len(ranks)} ranks at {usual:.3g} TFLOP/s each (median)")
    skew = max(each.clock for each in ranks) - min(each.clock for each in ranks)
    if skew > MAX_SKEW_S:
        first = min(range(len(ranks)), key=lambda rank: ranks[rank].clock)
        last = max(range(len(ranks)), key=lambda rank: ranks[rank].clock)
        text = f"{ranks[first].host} and {ranks[last].host} are {skew:.1f} s apart"
        yield Finding("clocks", WARN, text, "start chronyd on both")
    if len(ranks) > 1:
        yield from judge_pairs(ranks)


def judge_pairs(ranks: Sequence[Speeds]) -> Iterator[Finding]:
    """Pairs within nodes and between them are held against their like; a rank is slow that is so with most partners."""
    for name, within in (("within nodes", True), ("between nodes", False)):
        pairs = {
            (a, b): (ranks[a].bandwidth[b], ranks[a].latency[b])
            for a in range(len(ranks))
            for b in ranks[a].bandwidth
            if a < b and (ranks[a].host == ranks[b].host) == within
        }
        if not pairs:
            continue
        usual = statistics.median(bandwidth for bandwidth, _ in pairs.values())
        late = statistics.median(latency for _, latency in pairs.values())
        slow = [pair for pair, (bandwidth, _) in pairs.items() if bandwidth < SLOW_PAIR * usual]
        text = f"{usual:.3g} GB/s and {late:.0f} µs (median of {len(pairs)} pairs)"
        yield Finding(f"wires {name}", OK, text)
        blamed = [rank for rank in range(len(ranks)) if _mostly(rank, slow, list(pairs))]
        for rank in blamed:
            text = f"rank {rank} on {ranks[rank].host} is slow with most of its partners {name}"
            yield Finding("slow wire", WARN, text, f"look at {ranks[rank].host}'s links, or leave it out")
        for a, b in slow:
            if a not in blamed and b not in blamed:
                text = f"ranks {a} ({ranks[a].host}) and {b} ({ranks[b].host}): {pairs[a, b][0]:.3g} GB/s"
                yield Finding("slow wire", WARN, text, "look at the way between them")


def _mostly(rank: int, slow: Sequence[tuple[int, int]], pairs: Sequence[tuple[int, int]]) -> bool:
    """Whether more than half of a rank's pairs are slow, and there are at least two."""
    own = [pair for pair in pairs if rank in pair]
    return len(own) > 1 and sum(rank in pair for pair in slow) > len(own) / 2
