"""Where the ranks of a run meet: a key-value store of torch.distributed. Who does not come is named."""

import itertools
import socket
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import timedelta

from torch import distributed
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from megacore.mesh.collectives import PeerFailed
from megacore.mesh.rank_info import RankInfo

ARRIVED, HEARD, VERDICT = "arrived", "heard", "arrived/verdict"
"""Keys: a rank is there; it has heard the verdict; '' if all are there, else who is missing."""
TELL_S = 10.0
"""For word of a verdict to come through."""


class PortInUse(ValueError):
    """Rank 0 cannot listen where the ranks are to meet. Where a launcher chose the port it can choose another one."""


class RanksMissing(TimeoutError):
    """Not all ranks have come."""


def meet(info: RankInfo, limit_s: float) -> Store:
    """The store, once all ranks have come.

    Raises ``PortInUse`` on rank 0; ``RanksMissing``, with their names, where they were waited for for ``limit_s``
    seconds: on rank 0, or if that is missing itself on the first rank of each node, and ``PeerFailed`` on the others.
    """
    if info.rendezvous.startswith("file:"):
        # On one machine whoever started the ranks sees them end. The file goes with the last of so many.
        return opened(info, info.world_size, limit_s)
    # Torch waits for a world of one no longer than for this rank: of a larger one it would not say who is missing.
    store = opened(info, 1, limit_s)
    store.set(f"{ARRIVED}/{info.rank}", f"{socket.gethostname()} {first_of_node(info)} {info.local_world_size}")
    if info.rank == 0:
        call_the_roll(store, info, limit_s)
    else:
        hear_of_it(store, info, limit_s)
    return store


def opened(info: RankInfo, world_size: int, limit_s: float) -> Store:
    """The store, as torch opens it; rank 0 keeps it, unless torchrun does."""
    limit = timedelta(seconds=limit_s)
    try:
        store, _, _ = next(rendezvous(info.rendezvous, rank=info.rank, world_size=world_size, timeout=limit))
    except distributed.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise PortInUse(
                f"the port of the meeting point {info.rendezvous} is in use on this machine; choose a free one "
                "(MASTER_PORT), or wait until the earlier run has ended"
            ) from error
        if info.rank == 0:
            raise
        answers = "" if "socket has timed out" in str(error) else "; what answers there is something else"
        raise missing_0(
            info,
            f"rank 0 of {info.world_size} was not to be reached at {point(info)} from {socket.gethostname()} within "
            f"{limit_s:g} s{answers}",
        ) from error
    return store


def missing_0(info: RankInfo, text: str) -> Exception:
    """One rank of each node says it, the others that they follow."""
    advice = "look at its own words, at MASTER_ADDR and MASTER_PORT, and whether a firewall is between the nodes"
    return RanksMissing(f"{text}; {advice}") if info.local_rank == 0 else PeerFailed(text)


def call_the_roll(store: Store, info: RankInfo, limit_s: float) -> None:
    """Rank 0 waits for all, and tells those who are there of the rest."""
    names = [f"{ARRIVED}/{rank}" for rank in range(info.world_size)]
    try:
        store.wait(names, timedelta(seconds=limit_s))
    except distributed.DistStoreError as error:
        came = {rank: store.get(name).decode() for rank, name in enumerate(names) if store.check([name])}
        if len(came) < info.world_size:
            text = missing(came, info, limit_s)
            dismiss(store, came, text)
            raise RanksMissing(text) from error
    store.set(VERDICT, "")


def dismiss(store: Store, came: Collection[int], text: str) -> None:
    """The others hear of it; then nothing is left behind, since torchrun's store outlives an attempt."""
    store.set(VERDICT, text)
    heard = [f"{HEARD}/{rank}" for rank in came if rank]
    with suppress(distributed.DistStoreError):
        if heard:
            store.wait(heard, timedelta(seconds=TELL_S))
    for name in (VERDICT, *heard, *(f"{ARRIVED}/{rank}" for rank in came)):
        store.delete_key(name)


def hear_of_it(store: Store, info: RankInfo, limit_s: float) -> None:
    """The other ranks wait for rank 0's verdict."""
    try:
        store.wait([VERDICT], timedelta(seconds=limit_s + TELL_S))
    except distributed.DistStoreError as error:
        text = f"rank 0 of {info.world_size} has not come to {point(info)} within {limit_s:g} s"
        raise missing_0(info, text) from error
    if text := store.get(VERDICT).decode():
        store.set(f"{HEARD}/{info.rank}", "")
        raise PeerFailed(text)


def missing(came: Mapping[int, str], info: RankInfo, waited_s: float) -> str:
    """Who is not there, who is, and what may be the matter. ``came``: by rank, what it says of its place."""
    hosts: dict[str, list[int]] = {}
    homes: dict[int, str] = {}
    for rank, place in came.items():
        host, first, count = place.rsplit(" ", 2)
        hosts.setdefault(host, []).append(rank)
        if int(first) >= 0:
            homes |= dict.fromkeys(range(int(first), int(first) + int(count)), host)
    absent = [rank for rank in range(info.world_size) if rank not in came]
    by_host: dict[str, list[int]] = {}
    for rank in absent:
        by_host.setdefault(homes.get(rank, ""), []).append(rank)
    away = ", ".join(f"{spans(ranks)}{f' (on {host})' * bool(host)}" for host, ranks in by_host.items())
    here = ", ".join(f"{spans(ranks)} on {host}" for host, ranks in hosts.items())
    return (
        f"of {info.world_size} ranks {away} did not come to {point(info)} within {waited_s:g} s; there are {here}. "
        "Look at the words of those that are missing, whether all nodes were started with the same number of ranks, "
        "and whether a firewall is between the nodes"
    )


def first_of_node(info: RankInfo) -> int:
    """The first rank of this one's node, where ranks are dealt node by node, as torchrun does; -1: that is not sure."""
    return info.rank - info.local_rank if info.rendezvous.startswith("env:") else -1


def point(info: RankInfo) -> str:
    """Where the ranks meet, as a reader knows it."""
    if info.rendezvous.startswith("env:") and info.host:
        return f"{info.host} (MASTER_ADDR)"
    return info.rendezvous


def spans(ranks: Collection[int]) -> str:
    """``0-3, 7``."""
    runs = [[rank for _, rank in run] for _, run in itertools.groupby(enumerate(sorted(ranks)), lambda e: e[1] - e[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
