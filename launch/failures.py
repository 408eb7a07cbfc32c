"""What went wrong on which rank, which of several failures is the cause, and how it is shown. Imports no torch."""

import re
import signal
import textwrap
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from megacore.exits import raised_by_us
from megacore.monitor.heartbeat import HUNG

MAX_FRAMES = 6
# What a rank says when another one has gone: gloo, NCCL, torch's store, and our own agreement on errors.
_ABOUT_A_PEER = re.compile(
    r"closed by peer|reset by peer|Broken pipe|remote process exited|Connection refused|[Tt]imed? ?out waiting"
    r"|wait timeout|Socket Timeout|connectFullMesh|PeerFailed|NCCL communicator was aborted"
)

_OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|MemoryError|out of memory|can't allocate memory|Cannot allocate memory")
REMEDIES = (
    "Memory ran out. What helps, in this order: precision.dtype=bf16; parallel.recompute=full; a smaller "
    "train.micro_batch_size; parallel.zero=1, 2 or 3; more tp or pp; optim.offload=cpu and parallel.recompute=offload. "
    "`megacore train ... --dry-run` says what each rank needs, before it starts."
)


@dataclass(frozen=True)
class Failure:
    """One rank's end: `title` names it in a few words, `when` is in seconds of the machine's monotonic clock."""

    rank: int
    title: str
    message: str
    frames: tuple[str, ...] = ()
    is_user_error: bool = False
    is_follow_up: bool = False
    when: float = 0.0

    @classmethod
    def of_exception(cls, rank: int, error: BaseException) -> "Failure":
        """A rank that raised. Our own ValueErrors are the user's to mend (megacore/exits.py has the rule)."""
        title, message = type(error).__name__, str(error)
        if _OUT_OF_MEMORY.search(f"{title}: {message}"):
            message = f"{message}\n{REMEDIES}"
        frames = traceback.extract_tb(error.__traceback__)[1:][-MAX_FRAMES:]  # the first is the worker's own
        return cls(
            rank,
            title,
            message,
            tuple(f"{frame.filename}:{frame.lineno} in {frame.name}\n    {frame.line}" for frame in frames),
            is_user_error=isinstance(error, ValueError) and raised_by_us(error.__traceback__),
            is_follow_up=bool(_ABOUT_A_PEER.search(f"{title}: {message}")),
            when=time.monotonic(),
        )

    @classmethod
    def of_exit(cls, rank: int, exitcode: int | None) -> "Failure":
        """A rank that ended without a word."""
        if exitcode == HUNG:
            text = "the heartbeat ended it, since the run stood still; what held it up was told before"
            return cls(rank, "standstill", text, is_follow_up=True, when=time.monotonic())
        if exitcode is None or exitcode >= 0:
            return cls(rank, "exit", f"the process left with exit code {exitcode}", when=time.monotonic())
        name = signal.Signals(-exitcode).name
        hint = "; when memory runs out the kernel does this (dmesg tells)" if name == "SIGKILL" else ""
        return cls(rank, name, f"the process was killed by signal {name}{hint}", when=time.monotonic())

    @property
    def summary(self) -> str:
        """One line."""
        first = self.message.splitlines()[0] if self.message else ""
        return f"rank {self.rank}: {self.title}: {first}"


def cause(failures: Sequence[Failure]) -> Failure:
    """The failure that explains the others: the earliest that does not just report a lost peer."""
    return min(failures, key=lambda failure: (failure.is_follow_up, failure.when))


def describe(failure: Failure, num_ranks: int, width: int = 100) -> str:
    """A user error as its message; any other failure as a box with rank, exception and the innermost frames."""
    if failure.is_user_error:
        return f"megacore: {failure.message}"
    inside = width - 4
    head = f" rank {failure.rank} of {num_ranks} failed: {failure.title} "
    body = [*failure.message.splitlines(), *(line for frame in failure.frames for line in frame.splitlines())]
    lines = [piece for line in body for piece in (textwrap.wrap(line, inside, drop_whitespace=False) or [""])]
    return "\n".join(
        [
            f"╭─{head}".ljust(width - 1, "─") + "╮",
            *(f"│ {line:<{inside}} │" for line in lines),
            "╰".ljust(width - 1, "─") + "╯",
        ]
    )
