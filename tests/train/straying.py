"""Runs of which one rank strays, once: it stays away from a collective, or leaves out a message, as on a branch that
not all ranks take. (A sum left out between others of unequal size makes gloo abort; so that is a crash, no hang.)"""

import threading
from pathlib import Path
from typing import Any

from megacore.config.schema import RunConfig
from megacore.mesh import collectives, messages
from megacore.mesh.group import Pending
from megacore.mesh.rank_info import RankInfo
from megacore.monitor.run_folder import EVENTS
from megacore.pipeline import mailbox
from megacore.train.heart import Heart
from megacore.train.loop import train

TARGET = "tests.train.straying:strays"
STEP = 7
SUM, SEND = "sum", "send"


def strays(info: RankInfo, config: RunConfig, rank: int, what: str) -> int:
    """Train; in step STEP rank ``rank`` waits in vain before its first sum over several ranks, or does not send its
    first message. Not again once that was found."""
    found = Path(config.out, EVENTS)
    if info.rank == rank and not (found.exists() and '"hang"' in found.read_text()):
        Astray(what).patch()
    return train(info, config)


class Astray:
    """What one rank does instead; in a process of its own."""

    def __init__(self, what: str) -> None:
        self.what, self.now = what, False

    def patch(self) -> None:
        """From now on."""
        begins, reduces, exchanges = Heart.step, collectives.all_reduce_start, messages.exchange_start

        def step(heart: Heart, number: int) -> None:
            self.now = number == STEP
            begins(heart, number)

        def all_reduce_start(x: Any, group: Any, op: str = "sum") -> Pending:
            if self.now and group.size > 1 and self.what == SUM:
                threading.Event().wait()
            return reduces(x, group, op)

        def exchange_start(sends: Any, receives: Any, group: Any) -> list[Pending]:
            if self.now and sends and self.what == SEND:
                self.now = False
                left_out = [Pending.done(message.tensor) for message in sends]
                return [*left_out, *exchanges((), receives, group)]
            return exchanges(sends, receives, group)

        Heart.step = step  # type: ignore[method-assign]
        collectives.all_reduce_start = all_reduce_start
        mailbox.exchange_start = exchange_start
