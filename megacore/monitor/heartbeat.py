"""The heartbeat: every rank beats once a second, rank 0 listens and names who holds up all others.

Each beat carries step and last collective (``pulse.py``), so both are known before anybody asks; stacks are asked for
when something is wrong, which ``holdups.py`` judges. Rank 0 itself is watched by the others: it answers beats.

Sockets and threads of the standard library only, so that it works while torch.distributed hangs.
"""

import json
import math
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast

from megacore.monitor.holdups import Finding, Limits, Seen, described, late, silent
from megacore.monitor.pulse import LONGEST_LINE, Pulse, as_line, stack_of, understood

BEAT_S = 1.0
STOPPED_S = 4 * BEAT_S
"""What takes so much longer than it should have was stopped with its whole process."""
HUNG = 76
"""Exit code of a rank that the watchdog ended: what it found is told by rank 0."""


class Listener:
    """Rank 0's side: takes beats, answers them, and tells what it finds, once per rank and silence. One thread serves
    all ranks; who does not know the ``token``, or sends what is no beat, is hung up on."""

    def __init__(
        self,
        limits: Limits,
        tell: Callable[[Finding, str], None],
        world: int,
        token: str,
        host: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``tell(finding, stacks)`` is called from the listener's thread; ``host`` is the address that it listens at.
        Raises OSError where it cannot."""
        self.limits, self.tell, self.world, self.token, self.clock = limits, tell, world, token, clock
        self.seen: dict[int, Seen] = {}
        self.told: set[tuple[str, int]] = set()
        self.ended = self.wants_stacks = False
        self.selector = selectors.DefaultSelector()
        self.server = socket.create_server((host, 0), backlog=1024)
        self.server.setblocking(False)
        self.port: int = self.server.getsockname()[1]
        self.selector.register(self.server, selectors.EVENT_READ)
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Say goodbye, and stop listening."""
        self.ended = True
        self.thread.join(2 * BEAT_S)

    def beat(self, message: Mapping[str, Any]) -> None:
        """A rank was heard."""
        rank, now = message["rank"], self.clock()
        if message.get("bye"):
            self.seen.pop(rank, None)
            return
        each = self.seen.get(rank)
        if each is None:
            each = self.seen[rank] = Seen(message["host"], message["pid"], now, now)
        beat = {key: message[key] for key in ("step", "doing", "collectives", "last", "typical_s", "counts", "waits")}
        if any(beat[key] != each.beat.get(key) for key in ("step", "doing", "collectives")):
            each.changed = now
        each.heard, each.beat, each.stack = now, beat, message.get("stack", "")
        self.told.discard(("silent", rank))

    def look(self) -> Finding | None:
        """Tell what is new; returns what is bad enough to end the run."""
        now, seen = self.clock(), self.seen
        soon = replace(self.limits, silent_s=self.limits.silent_s / 2)
        self.wants_stacks = bool(list(silent(seen, now, soon)) or late(seen, now, soon))
        found = list(silent(seen, now, self.limits))
        behind = None if found else late(seen, now, self.limits)
        found += [behind] if behind else []
        if not behind:
            self.told = {each for each in self.told if each[0] != "late"}
        for finding in found:
            if (finding.kind, finding.rank) not in self.told:
                self.told.add((finding.kind, finding.rank))
                self.tell(finding, "\n".join(f"rank {r}:\n{s.stack}" for r, s in sorted(seen.items()) if s.stack))
        ends = {"silent": self.limits.abort_s, "late": self.limits.step_s or math.inf}
        return next((each for each in found if each.seconds >= ends[each.kind]), None)

    def forgive(self) -> None:
        """It was this process that stood still: whatever was not heard meanwhile says nothing."""
        for each in self.seen.values():
            each.heard = each.changed = self.clock()

    def _serve(self) -> None:
        looked = time.monotonic()
        while not self.ended:
            self._exchange(BEAT_S / 2)
            now = time.monotonic()
            if now - looked > STOPPED_S:
                self.forgive()
            if now - looked >= BEAT_S / 2:
                looked = now
                finding = self.look()
                self._answer({"stack": self.wants_stacks, "end": finding.text if finding else ""})
                if finding:
                    self._exchange(BEAT_S)  # the answers must leave
                    os._exit(HUNG)
        self._answer({"stack": False, "end": "", "bye": True})
        self._exchange(0.0)
        for key in list(self.selector.get_map().values()):
            cast(socket.socket, key.fileobj).close()

    def _exchange(self, seconds: float) -> None:
        """Take and send what is there, for so long."""
        until = time.monotonic() + seconds
        while True:
            for key, events in self.selector.select(max(0.0, until - time.monotonic())):
                if key.data is None:
                    self._accept()
                elif not key.data.served(events, self._take):
                    self.selector.unregister(key.fileobj)
                    key.data.connection.close()
                elif events & selectors.EVENT_WRITE and not key.data.outbox:
                    # a connection can nearly always be written to: asking for that with nothing to say never sleeps
                    self.selector.modify(key.fileobj, selectors.EVENT_READ, key.data)
            if time.monotonic() >= until:
                return

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self.server.accept()
            connection.setblocking(False)
            self.selector.register(connection, selectors.EVENT_READ, Peer(connection))

    def _take(self, line: bytes) -> bool:
        """Whether that was a beat of one of ours."""
        message = understood(line, self.token, self.world)
        if message is not None:
            self.beat(message)
        return message is not None

    def _answer(self, message: Mapping[str, Any]) -> None:
        line = as_line(message)
        for key in list(self.selector.get_map().values()):
            if key.data is not None and len(key.data.outbox) < LONGEST_LINE:  # else it is stopped, and reads nothing
                key.data.outbox += line
                self.selector.modify(key.fileobj, selectors.EVENT_READ | selectors.EVENT_WRITE, key.data)


@dataclass
class Peer:
    """One connection of the listener's."""

    connection: socket.socket
    inbox: bytes = b""
    outbox: bytes = b""

    def served(self, events: int, take: Callable[[bytes], bool]) -> bool:
        """Read and write what can be, without waiting; False where the connection is to be closed."""
        try:
            if events & selectors.EVENT_WRITE and self.outbox:
                self.outbox = self.outbox[self.connection.send(self.outbox) :]
            if events & selectors.EVENT_READ:
                data = self.connection.recv(LONGEST_LINE)
                if not data:
                    return False
                *lines, self.inbox = (self.inbox + data).split(b"\n")
                return len(self.inbox) < LONGEST_LINE and all(map(take, lines))
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True


class Beater:
    """Every rank's side: sends its pulse and hears rank 0's answers; a connection that breaks is made again."""

    def __init__(
        self,
        rank: int,
        pulse: Pulse,
        address: tuple[str, int],
        token: str,
        limits: Limits,
        tell: Callable[[Finding, str], None],
        main_thread: int,
    ) -> None:
        """``tell`` is called where rank 0 is silent, on rank 1. Raises OSError where rank 0 cannot be reached."""
        self.rank, self.pulse, self.address, self.limits = rank, pulse, address, limits
        self.tell, self.main_thread = tell, main_thread
        self.who = {"host": socket.gethostname(), "pid": os.getpid(), "token": token}
        self.heard = time.monotonic()
        self.gives_stack = self.ended = self.told = self.parted = False
        self.lock = threading.Lock()
        self.buffer = b""
        self.connection = self._connect(30.0)
        threading.Thread(target=self._work, daemon=True).start()

    def close(self) -> None:
        """Say goodbye: silence is meant from now on."""
        with self.lock, suppress(OSError):
            self.ended = True
            message = {"rank": self.rank, "bye": True, **self.who}
            self.connection.sendall(as_line(message))
            self.connection.close()

    def _connect(self, timeout_s: float) -> socket.socket:
        connection = socket.create_connection(self.address, timeout=timeout_s)
        connection.settimeout(BEAT_S)
        self.buffer = b""
        return connection

    def _work(self) -> None:
        while not (self.ended or self.parted):
            try:
                self._send()
                self._hear(BEAT_S)
            except TimeoutError:
                pass  # rank 0 does not read: silent, if that goes on
            except OSError:
                if slept(BEAT_S):
                    self.heard = time.monotonic()
                with self.lock, suppress(OSError):
                    if not self.ended:
                        self.connection.close()
                        self.connection = self._connect(2 * BEAT_S)
            self._watch_rank_0()

    def _send(self) -> None:
        message = {**self.pulse.as_beat(self.rank), **self.who}
        if self.gives_stack:
            message["stack"] = stack_of(self.main_thread)
        with self.lock:
            if not self.ended:
                self.connection.sendall(as_line(message))

    def _hear(self, seconds: float) -> None:
        """Take answers for so long. Raises OSError where the connection is closed."""
        began = now = time.monotonic()
        while now - began < seconds and not self.ended:
            self.connection.settimeout(max(0.01, seconds - (now - began)))
            with suppress(TimeoutError):
                data = self.connection.recv(LONGEST_LINE)
                if not data:
                    raise ConnectionResetError("rank 0 has closed the connection")
                *lines, self.buffer = (self.buffer + data).split(b"\n")
                for line in lines:
                    self._take(json.loads(line))
            now = time.monotonic()
        if now - began > STOPPED_S:
            self.heard = now  # it was this process that stood still

    def _take(self, answer: Mapping[str, Any]) -> None:
        self.heard = time.monotonic()
        self.gives_stack, self.parted = bool(answer["stack"]), bool(answer.get("bye"))
        if answer["end"] and not self.ended:
            time.sleep(0.0 if self.rank else BEAT_S)
            os._exit(HUNG)

    def _watch_rank_0(self) -> None:
        quiet = time.monotonic() - self.heard
        if self.rank == 0 or self.ended or self.parted or quiet < self.limits.silent_s:
            self.told = False
            return
        text = f"rank 0 has been silent for {quiet:.0f} s: it is stopped, frozen or cut off. This is rank {self.rank}, "
        finding = Finding("silent", 0, quiet, text + f"in {described(self.pulse.as_beat(self.rank))}")
        if not self.told and self.rank == 1:
            self.tell(finding, stack_of(self.main_thread))
        self.told = True
        if quiet >= self.limits.abort_s:
            os._exit(HUNG)


def slept(seconds: float) -> bool:
    """Sleep; whether it took so much longer that the whole process must have been stopped."""
    began = time.monotonic()
    time.sleep(seconds)
    return time.monotonic() - began > seconds + STOPPED_S
