"""What a rank tells of itself, how that goes over the wire, and what its thread is doing.

A message is a line of JSON. What is no beat of one of ours is never taken apart any further.
"""

import hmac
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

LONGEST_LINE = 1 << 16
"""Bytes of a message; longer ones are none of ours."""
BEAT_TYPES = MappingProxyType(
    {"rank": int, "step": int, "collectives": int, "pid": int, "typical_s": float}
    | dict.fromkeys(("host", "doing", "last"), str)
    | {"counts": dict, "waits": bool}
)
MOST_COUNTS = 1000
WAITING = ("megacore.mesh.", "torch.distributed.")
"""Modules in which a rank waits for others."""
STACK_FRAMES = 24


@dataclass
class Pulse:
    """What a rank is doing. The training thread writes, the beating thread reads."""

    step: int = 0
    doing: str = "start-up"
    collectives: Callable[[], tuple[int, str]] = lambda: (0, "")
    """How many were begun, and the last, such as ``all_reduce over dp``."""
    counts: Callable[[], Mapping[Any, int]] = dict
    """How many among the same ranks, by what these have in common: see ``mesh.group.CommLog``."""
    waits: Callable[[], bool] = lambda: False
    """Whether it is in one of them now."""
    typical_s: float = 0.0
    """What a step takes, 0 while that is not known."""

    def as_beat(self, rank: int) -> dict[str, Any]:
        """What is sent."""
        number, last = self.collectives()
        return {
            "rank": rank,
            "step": self.step,
            "doing": self.doing,
            "collectives": number,
            "last": last,
            "counts": {" ".join(map(str, among)): n for among, n in dict(self.counts()).items()},
            "waits": self.waits(),
            "typical_s": self.typical_s,
        }


def as_line(message: Mapping[str, Any]) -> bytes:
    """A message as it is sent."""
    return json.dumps(message).encode() + b"\n"


def understood(line: bytes, token: str, world: int) -> dict[str, Any] | None:
    """A beat of one of ``world`` ranks that know the token; None: anything else."""
    try:
        message = json.loads(line)
        if not hmac.compare_digest(message["token"].encode(), token.encode()):
            return None
        wanted = {"rank": int} if message.get("bye") else BEAT_TYPES
        if any(type(message[name]) not in (kind, int if kind is float else kind) for name, kind in wanted.items()):
            return None
        counts = message.get("counts", {})
        if len(counts) > MOST_COUNTS or any(type(number) is not int for number in counts.values()):
            return None
        return message if 0 <= message["rank"] < world and isinstance(message.get("stack", ""), str) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def waits(thread: int) -> bool:
    """Whether a thread is in a collective or message. (On CUDA the host is ahead of these, and waits elsewhere.)"""
    frame = sys._current_frames().get(thread)
    return frame is not None and str(frame.f_globals.get("__name__", "")).startswith(WAITING)


def stack_of(thread: int) -> str:
    """The innermost frames of a thread, as text."""
    frame = sys._current_frames().get(thread)
    return "" if frame is None else "".join(traceback.format_stack(frame)[-STACK_FRAMES:])
