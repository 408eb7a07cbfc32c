"""How long ranks need to hand data around, by what they do, how much it is and how they are wired.

n ranks that hold s bytes of a whole tensor, with bandwidth B per rank and a latency a, take

    all-reduce                                 x = 2 (n-1)/n s / B
    all-gather, reduce-scatter, all-to-all     x =   (n-1)/n s / B
    send                                       x =           s / B

and, since data goes in pieces of which the first must arrive and each costs a latency, at the best size of a piece

    seconds = x + 2 sqrt(x a) + 1.5 a + what more nodes add to the latency

(Hockney 1994, and the usual choice of a pipeline's pieces: Thakur et al. 2005.) Within an NVLink domain whose switches
add up (NVLS), all-reduce has a bandwidth of its own. Of ranks on several nodes, those of a node each drive their own
rail: rings cross every node's border by all of these rails at once, and the slower of node and rails counts.
All-to-alls send what is meant for other nodes over the network and the rest within the node, both at once. Sums over
many nodes go up and down a tree (NCCL 2.4, 2019), other collectives around a ring.
"""

import math
from functools import lru_cache

from megacore.cost.machine import Machine

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
HOP = 0.1
"""Of a link's latency, what every further node of a ring adds."""


@lru_cache(maxsize=1 << 16)
def collective_s(machine: Machine, kind: str, num_bytes: float, ranks: int, stride: int = 1) -> float:
    """Seconds of one collective over ``num_bytes`` (the whole tensor's; of a send the message's) among ``ranks`` ranks
    that are ``stride`` apart. Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not a collective; use one of {', '.join(KINDS)}")
    if ranks < 2 or num_bytes <= 0:
        return 0.0
    together = max(1, min(ranks, machine.nvlink_domain // stride))
    within = together == ranks
    link = machine.node if within else machine.network
    latency, share = link.latency_us * 1e-6, (ranks - 1) / ranks
    if kind == "send":
        return _pieces(num_bytes / link.gb_per_s / 1e9, latency)
    if kind == "all_to_all":
        inside = num_bytes * (together - 1) / ranks / machine.node.gb_per_s / 1e9
        beyond = num_bytes * (ranks - together) / ranks / machine.network.gb_per_s / 1e9
        return _pieces(max(inside, beyond), latency)
    rate = machine.node.gb_per_s if within else min(machine.node.gb_per_s, machine.network.gb_per_s * together)
    nodes = max(1.0, ranks / together)
    if kind == "all_reduce":
        if within and machine.nvls_gb_per_s:
            rate = machine.nvls_gb_per_s
        return _pieces(2 * share * num_bytes / rate / 1e9, latency) + latency * math.log2(nodes)
    return _pieces(share * num_bytes / rate / 1e9, latency) + HOP * latency * (nodes - 1)


def _pieces(seconds: float, latency: float) -> float:
    """What takes ``seconds`` at full bandwidth, in pieces of the best size."""
    return seconds + 2 * math.sqrt(seconds * latency) + 1.5 * latency
