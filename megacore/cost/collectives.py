"""How long ranks need to hand data around, by what they do, how much it is and how they are wired.

With n ranks that hold s bytes (of the whole tensor) each, bandwidth B per rank and a latency a per hop:

    all-reduce by rings       2 (n-1)/n s / B + 2 (n-1) a
    all-reduce by trees       2 s / B + 2 log2(n) a         (one of both is taken, whichever is faster, as NCCL does)
    all-gather, reduce-scatter, all-to-all   (n-1)/n s / B + latency
    send                      s / B + a

Of ranks on several nodes, g of which share a node, a ring crosses every node's border by g rails at once: each rank's
rail carries its share, so the slower of the two links counts. All-to-alls send (n-g)/n over the network and the rest
within the node, both at once. NCCL: "Massively scale your deep learning training with NCCL 2.4" (2019) on trees.
"""

import math
from functools import lru_cache

from megacore.cost.machine import Link, Machine

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")


@lru_cache(maxsize=1 << 16)
def collective_s(machine: Machine, kind: str, num_bytes: float, ranks: int, stride: int = 1) -> float:
    """Seconds of one collective over ``num_bytes`` (the whole tensor's) among ``ranks`` ranks that are ``stride``
    apart, each alone on its links. Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not a collective; use one of {', '.join(KINDS)}")
    if ranks < 2 or num_bytes <= 0:
        return 0.0
    together = max(1, min(ranks, machine.nvlink_domain // stride))
    link = machine.node if together == ranks else machine.network
    if kind == "send":
        return num_bytes / link.gb_per_s / 1e9 + link.latency_us * 1e-6
    if kind == "all_to_all":
        return _all_to_all(machine, num_bytes, ranks, together)
    rate, hop = _ring(machine, ranks, together)
    steps, share = ranks - 1, (ranks - 1) / ranks
    times = 2 if kind == "all_reduce" else 1
    nodes = ranks // together
    logarithm = math.log2(together) + math.log2(nodes) if nodes > 1 else math.log2(ranks)
    by_ring = times * (share * num_bytes / rate + steps * hop)
    by_tree = times * (num_bytes / (0.9 * rate) + logarithm * _latency(machine, together == ranks))
    return min(by_ring, by_tree) + START_S


START_S = 10e-6
"""Of any collective: its launch, and the ranks' coming together."""
HOP = 0.15
"""Of a link's latency, which is a small collective's, that a step of a ring takes."""


def _latency(machine: Machine, within: bool) -> float:
    link = machine.node if within else machine.network
    return 0.3 * link.latency_us * 1e-6


def _ring(machine: Machine, ranks: int, together: int) -> tuple[float, float]:
    """(bytes/s, seconds of a step) of rings; across nodes each rank of a node has a rail of its own."""
    node, network = machine.node, machine.network
    if together == ranks:
        return node.gb_per_s * 1e9, HOP * node.latency_us * 1e-6
    rails = together
    rate = min(node.gb_per_s, network.gb_per_s * rails) * 1e9
    nodes = ranks / together
    hop = (nodes * network.latency_us + (ranks - nodes) * node.latency_us) / ranks
    return rate, HOP * hop * 1e-6


def _all_to_all(machine: Machine, num_bytes: float, ranks: int, together: int) -> float:
    within = num_bytes * (together - 1) / ranks / machine.node.gb_per_s / 1e9
    beyond = num_bytes * (ranks - together) / ranks / machine.network.gb_per_s / 1e9
    far: Link = machine.network if ranks > together else machine.node
    return max(within, beyond) + math.log2(ranks) * far.latency_us * 1e-6 * 0.5 + START_S
