"""Which nodes of a job have come to the meeting point, and which have not. Imports no torch.

Torch's list of those that wait is read as each node holds it; a node whose time is up strikes itself off first, so what
counts is the longest list of the last seconds.
"""

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

LOOK_EVERY_S = 0.2
RECENT_S = 10.0
"""A longer list than the present one is believed so long."""
SAY_EVERY_S = 60.0


class Roll:
    """Of one job's nodes; ``came`` are the addresses of those that wait, this one's among them."""

    def __init__(self, where: str = "", expected: int = 0, write: Callable[[str], object] | None = None) -> None:
        """``where`` they meet; ``expected``: so many must come; ``write`` is told now and then who is waited for."""
        self.where, self.expected, self.write = where, expected, write
        self.came: list[str] = []
        self.waited_s = 0.0
        self._seen_at = 0.0

    @contextmanager
    def taken(self, handler: Any) -> Iterator[None]:
        """While a node waits at torch's rendezvous ``handler``."""
        done = threading.Event()
        self.came, start = [], time.monotonic()
        thread = threading.Thread(target=self._look, args=(handler, done), name="roll", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.waited_s = time.monotonic() - start

    def _look(self, handler: Any, done: threading.Event) -> None:
        start = said_at = time.monotonic()
        while not done.wait(LOOK_EVERY_S):
            now = time.monotonic()
            with suppress(AttributeError, RuntimeError):  # another torch; a list that changes while it is read
                self.note([str(each.addr) for each in handler._state_holder.state.participants], now)
            if self.write is not None and now - said_at >= SAY_EVERY_S and len(self.came) < self.expected:
                self.waited_s = now - start
                self.write(f"megacore: at {self.where} nodes are waited for: {self.told()}\n")
                said_at = now

    def note(self, present: list[str], now: float) -> None:
        """These wait at the moment ``now``, in seconds."""
        if len(present) >= len(self.came) or now - self._seen_at > RECENT_S:
            self.came, self._seen_at = sorted(present), now

    def told(self) -> str:
        """How many have come, and who; who has not, where the scheduler's list tells."""
        here = f": {', '.join(self.came)}" if self.came else ""
        away = absent(self.came, os.environ)
        lacking = f"; missing: {', '.join(away)}" if away else ""
        return f"{len(self.came)} of {self.expected} have come in {self.waited_s:.0f} s{here}{lacking}"


def absent(came: Collection[str], environ: Mapping[str, str]) -> list[str]:
    """Slurm's nodes that are not among the addresses that came; none where names and addresses do not fit together."""
    named: dict[str, set[str]] = {}
    try:
        for host in expand_hosts(environ.get("SLURM_JOB_NODELIST", "")):
            named[host] = {str(each[4][0]) for each in socket.getaddrinfo(host, None)}
    except (OSError, ValueError):  # a name that is not known; a list of another form
        return []
    if not set(came) <= set().union(*named.values()):
        return []  # they meet in another network than that of their names
    return [host for host, addresses in named.items() if not addresses & set(came)]


def expand_hosts(nodes: str) -> list[str]:
    """Slurm's compressed list: ``gpu[008-010],login`` is gpu008, gpu009, gpu010, login. Raises ValueError."""
    hosts: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        match = re.search(r"\[([^\]]*)\]", part)
        if match is None:
            hosts.append(part)
            continue
        for each in match[1].split(","):
            low, _, high = each.partition("-")
            for number in range(int(low), int(high or low) + 1):
                name = f"{part[: match.start()]}{number:0{len(low)}}{part[match.end() :]}"
                hosts += expand_hosts(name)
    return hosts
