"""Ranks that talk to each other, and a record of what they said."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

Ranges = Callable[[str], AbstractContextManager[Any]]
"""Makes a named range in a profile, to be entered."""
IMAGINED = "imagined"
"""The backend of ranks that are not there (`mesh/imagined.py`)."""


class CommRecord(NamedTuple):
    """One collective as the formulas count it, whatever primitives carried it out.

    `num_elements` is the size of the whole tensor: the one reduced, the gathered result, the input of a
    reduce-scatter, one rank's input of an all-to-all. `stream` is what it was called from: the host, or a stream of the
    device, with whose work it is in order (NCCL has streams of its own, one per communicator). `peer` is the other rank
    of a message, by its place in the group.
    """

    axis: str
    operation: str
    num_elements: int
    dtype: torch.dtype
    stream: str = "host"
    peer: int = -1

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor."""
        return self.num_elements * self.dtype.itemsize

    def wire_elements(self, size: int) -> float:
        """Elements that each of `size` ranks sends under the bandwidth-optimal algorithm (the bus factor)."""
        share = (size - 1) / size
        return {"all_reduce": 2 * share, "broadcast": 1.0, "send": 1.0, "receive": 0.0, "barrier": 0.0}.get(
            self.operation, share
        ) * self.num_elements


class CommLog(list[CommRecord]):
    """All collectives of this rank in order. Handed to the mesh by who wants to count; nothing else fills it.

    ``keeps``: whether it takes note of them now; ``receives``: of both ends of messages, else of sends alone.
    ``ranges``: makes each a range in a profile. ``begun``, ``last`` and ``counts`` are kept in any case: how many there
    were, (axis, operation) of the last, and how many among the same ranks, by names that all of these have in common.
    """

    def __init__(self, keeps: bool = True, receives: bool = False) -> None:
        super().__init__()
        self.keeps, self.receives = keeps, receives
        self.ranges: Ranges | None = None
        self.begun, self.last = 0, ("", "")
        self.counts: Counter[tuple[str, int] | tuple[int, int]] = Counter()

    def totals(self) -> Counter[tuple[str, str]]:
        """How many collectives there were of each (axis, operation)."""
        return Counter((record.axis, record.operation) for record in self)


@dataclass(frozen=True)
class Group:
    """The ranks along one axis that this process is one of, in order, and its own place among them.

    A group of size 1 has no handle and no collective over it touches torch.distributed: it is a true no-op.
    `backend` is gloo or nccl; or `IMAGINED`, which has no handles either.
    """

    axis: str
    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    handle: ProcessGroup | None = None
    backend: str = ""
    log: CommLog | None = None
    tags: Iterator[int] = field(default_factory=count, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert 0 <= self.rank < len(self.ranks), f"{self.axis}: rank {self.rank} is not among {len(self.ranks)}"
        alone = self.size == 1 or self.backend == IMAGINED
        assert (self.handle is None) == alone, f"{self.axis}: a handle belongs to more than one rank"

    @classmethod
    def single(cls, axis: str) -> "Group":
        """A group of this process alone."""
        return cls(axis)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    def next_tag(self) -> int:
        """A number that is the same on all ranks for the same collective: they call them in the same order."""
        return next(self.tags) % 2**30

    def record(self, operation: str, x: Tensor, num_elements: int | None = None, peer: int = -1) -> None:
        """Notes a collective or message, if anybody wants to know; ``num_elements``: where they are not x's."""
        if self.log is None:
            return
        self.log.begun += 1
        self.log.last = (self.axis, operation)
        self.log.counts[self._among(operation, peer)] += 1
        if self.log.keeps:
            number = x.numel() if num_elements is None else num_elements
            self.log.append(CommRecord(self.axis, operation, number, x.dtype, _stream_of(x.device), peer))

    def _among(self, operation: str, peer: int) -> tuple[str, int] | tuple[int, int]:
        """Those who take part: of a collective axis and first rank, of a message sender and receiver."""
        if peer < 0:
            return self.axis, self.ranks[0]
        me, other = self.ranks[self.rank], self.ranks[peer]
        return (me, other) if operation == "send" else (other, me)


def _stream_of(device: torch.device) -> str:
    """The stream that work on a device is now given to."""
    return f"cuda {torch.cuda.current_stream(device).stream_id}" if device.type == "cuda" else "host"


class Message(NamedTuple):
    """One end of a message: a contiguous tensor, to be sent to rank ``peer`` of the group or filled from there."""

    tensor: Tensor
    peer: int
    tag: int


class Pending:
    """A collective under way. Until `wait` returns, its inputs must be neither written nor freed."""

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish: Callable[[], Tensor] | None = finish
        self._result: Tensor | None = None

    def wait(self) -> Tensor:
        """The result. On CUDA the current stream waits, not the host. Further calls give the same tensor."""
        if self._finish is not None:
            self._result = self._finish()
            self._finish = None  # lets go of the inputs
        assert self._result is not None
        return self._result

    def then(self, step: Callable[[Tensor], Tensor]) -> "Pending":
        """This collective followed by a local `step` on its result, which `wait` takes."""
        return Pending(lambda: step(self.wait()))

    @classmethod
    def done(cls, x: Tensor) -> "Pending":
        """A collective over one rank: it was over before it began."""
        return cls(lambda: x)
