"""Faults on purpose, so that tests can show what a run survives: MEGACORE_FAIL=POINT[#N]:RANK:STEP:ACTION.

POINT is ``step`` (before a step begins) or an operation of the save after it, which may still go on when later steps
have begun: ``write``, ``fsync``, ``rename``, ``remove``; before the first save STEP is 0 for these. N counts them from
1 (the default) within a save. RANK and STEP may be ``*``. ACTION is ``kill`` (SIGKILL), ``raise``, ``enospc`` (as of a
full disk) or ``hang``. Several are separated by commas.

Memory fails, too (``train.spoiling``): POINT is what is spoilt, ``weight``, ``moment`` or ``number`` (such as the loss
scale) before the step begins, ``gradient`` when it is summed over ranks, before it is clipped, or ``activation``, what
a block gives in the first microbatch; N says which tensor, or block, of this rank. ACTION is then ``bitflip``, ``nan``
or ``inf``, of one element.
"""

import errno
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

VARIABLE = "MEGACORE_FAIL"
POINTS = ("step", "write", "fsync", "rename", "remove")
ACTIONS = ("kill", "raise", "enospc", "hang")
IN_MEMORY = ("weight", "moment", "number", "gradient", "activation")
SPOILING = ("bitflip", "nan", "inf")


class Provoked(RuntimeError):
    """A fault that was asked for."""


@dataclass(frozen=True)
class Fault:
    """One of them; None stands for any."""

    point: str
    count: int
    rank: int | None
    step: int | None
    action: str


class Failpoints:
    """The faults of one rank; ``step`` is the one that is being saved."""

    def __init__(self, faults: tuple[Fault, ...] = ()) -> None:
        self.faults, self.step = faults, 0
        self.seen: Counter[str] = Counter()
        self.begun: Callable[[int], None] = lambda step: None
        """Told of each step that begins; where memory is to fail, ``train.spoiling`` listens."""

    @classmethod
    def of(cls, environment: Mapping[str, str], rank: int) -> "Failpoints":
        """Those that the environment asks for. Raises ValueError for what cannot be understood."""
        texts = [text for text in environment.get(VARIABLE, "").split(",") if text]
        return cls(tuple(fault for fault in map(parse, texts) if fault.rank in (None, rank)))

    def begin(self, step: int) -> None:
        """A step begins."""
        self._hit("step", step, 1)
        self.begun(step)

    def begin_save(self, step: int) -> None:
        """The save after a step begins; the one before has ended."""
        self.step = step
        self.seen.clear()

    def notice(self, operation: str) -> None:
        """An operation of a save is about to happen, such as "write NAME"."""
        if self.faults:
            point = operation.partition(" ")[0]
            self.seen[point] += 1
            self._hit(point, self.step, self.seen[point])

    def _hit(self, point: str, step: int, count: int) -> None:
        """Fail here, if that is asked for."""
        for fault in self.faults:
            if fault.point == point and fault.count == count and fault.step in (None, step):
                _fail(fault, step)


def parse(text: str) -> Fault:
    """One fault. Raises ValueError that shows the form."""
    parts = text.split(":")
    if len(parts) == 4:
        point, _, count = parts[0].partition("#")
        numbers = [None if part == "*" else _number(part) for part in parts[1:3]]
        of_point = {**dict.fromkeys(POINTS, ACTIONS), **dict.fromkeys(IN_MEMORY, SPOILING)}
        known = parts[3] in of_point.get(point, ()) and _number(count or "1") > 0
        if known and all(number is None or number >= 0 for number in numbers):
            return Fault(point, int(count or 1), numbers[0], numbers[1], parts[3])
    raise ValueError(
        f"{VARIABLE}={text} is not POINT[#N]:RANK:STEP:ACTION with POINT one of {', '.join(POINTS)}, ACTION one of "
        f"{', '.join(ACTIONS)}, or POINT one of {', '.join(IN_MEMORY)}, ACTION one of {', '.join(SPOILING)}, and "
        "numbers or * between; write write#2:0:100:kill, or unset it"
    )


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else -1


def _fail(fault: Fault, step: int) -> None:
    what = f"{VARIABLE}: {fault.point} at step {step}"
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.action == "hang":
        threading.Event().wait()
    if fault.action == "enospc":
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({what})")
    raise Provoked(what)
