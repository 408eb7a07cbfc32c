"""How a node finds the others: torch's rendezvous, kept by one of the nodes. Brings torch."""

import threading
from dataclasses import dataclass

from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from megacore.launch.places import free_port, refusal

READ_LIMIT_S = 30
"""For a word with the meeting point."""
LAST_CALL_S = 10
"""So long, once there are enough nodes, for more of them."""
ANSWER_S = 10
"""A meeting point that another node of this machine keeps answers within this time."""
LOST = (RendezvousConnectionError, RendezvousTimeoutError, DistNetworkError, DistStoreError)


@dataclass(frozen=True)
class Nodes:
    """How many, and how many ranks on each."""

    fewest: int
    most: int
    nproc: int


@dataclass(frozen=True)
class Place:
    """The job, where its nodes meet, this node's own address, and whether the meeting point is on this node."""

    job: str
    host: str
    port: int
    address: str
    is_host: bool


def meeting(nodes: Nodes, place: Place, wait_s: float) -> RendezvousHandler:
    """The way to the meeting point, or the meeting point itself. Raises ``LOST`` where it cannot be reached, ValueError
    where another program is in its place."""
    # of several nodes on one machine, as in a rehearsal, the first keeps the list
    refused = refusal(place.port) if place.is_host else ""
    keeps = place.is_host and not refused
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=f"{place.host}:{place.port}",
        run_id=place.job,
        min_nodes=nodes.fewest,
        max_nodes=nodes.most,
        local_addr=place.address,
        is_host=keeps,
        join_timeout=int(wait_s),
        last_call_timeout=LAST_CALL_S,
        read_timeout=READ_LIMIT_S,
    )
    if keeps:
        return get_rendezvous_handler(parameters)
    found = sought(parameters, ANSWER_S if refused else READ_LIMIT_S + ANSWER_S)
    if found is None and refused and (refused := refusal(place.port)):
        raise ValueError(
            f"--meet={place.host}:{place.port}: this node cannot listen on its port {place.port} ({refused}), and no "
            f"node of a job does: end the program that has it (`ss -ltnp 'sport = :{place.port}'` names it), or give "
            f"all nodes another port, such as --meet={place.host}:{free_port()}"
        )
    if found is None:
        raise RendezvousConnectionError(f"whatever listens at {parameters.endpoint} does not answer as a node does")
    return found


def sought(parameters: RendezvousParameters, limit_s: float) -> RendezvousHandler | None:
    """The way to a meeting point that another process keeps; None: no word in ``limit_s`` seconds. Raises ``LOST``."""
    found: list[RendezvousHandler] = []
    raised: list[Exception] = []

    def seek() -> None:
        try:
            found.append(get_rendezvous_handler(parameters))
        except Exception as error:
            raised.append(error)

    # Aside: torch 2.13 waits for ever, deaf to signals, for a program that accepts and says nothing.
    thread = threading.Thread(target=seek, name="meeting", daemon=True)
    thread.start()
    thread.join(limit_s)
    if raised:
        raise raised[0]
    return found[0] if found else None
