"""Finds the rank that holds up all others: every rank beats once a second, rank 0 listens and names who does not.

A rank that is stopped, frozen or cut off sends nothing: it is *silent*. One that is alive but does not come to a
collective that its peers wait in (an endless loop, a lost message, a slow disk) is *late*: it has begun fewer
collectives than the others while nobody gets on. Each beat carries step and last collective, so both are known before
anybody asks; stacks are asked for when something is wrong. Rank 0 itself is watched by the others: it answers beats.

Sockets and threads of the standard library only, so that it works while torch.distributed hangs.
"""

import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

BEAT_S = 1.0
SLOW = 10.0
STACK_FRAMES = 12
HUNG = 76
"""Exit code of a rank that the watchdog ended: what it found is told by rank 0."""


@dataclass
class Pulse:
    """What a rank is doing. The training thread writes, the beating thread reads."""

    step: int = 0
    doing: str = "start-up"
    collectives: Callable[[], tuple[int, str]] = lambda: (0, "")
    """How many were begun, and the last, such as ``all_reduce over dp``."""
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
            "typical_s": self.typical_s,
        }


@dataclass(frozen=True)
class Limits:
    """Seconds: until a silent rank is named; until all ranks are ended because of it; and without any progress until
    they are ended, 0: never. (A late rank is named after ``SLOW`` usual steps, or as late as a silent one.)"""

    silent_s: float = 8.0
    abort_s: float = 60.0
    step_s: float = 0.0


@dataclass
class Seen:
    """What rank 0 knows of a rank."""

    host: str
    pid: int
    heard: float
    """When it was heard last, in seconds of rank 0's monotonic clock."""
    changed: float
    """When what it does changed last."""
    beat: Mapping[str, Any] = field(default_factory=dict)
    stack: str = ""


@dataclass(frozen=True)
class Finding:
    """Who holds up the others, since when, and how that is said."""

    kind: str
    """silent or late."""
    rank: int
    seconds: float
    text: str


def silent(seen: Mapping[int, Seen], now: float, limits: Limits) -> Iterator[Finding]:
    """Ranks of which nothing is heard."""
    for rank, each in sorted(seen.items()):
        quiet = now - each.heard
        if quiet >= limits.silent_s:
            where = f"rank {rank} ({each.host}, process {each.pid})"
            text = (
                f"{where} has been silent for {quiet:.0f} s: it is stopped, frozen or cut off. It was last seen in "
                f"{described(each.beat)}"
            )
            yield Finding("silent", rank, quiet, text)


def late(seen: Mapping[int, Seen], now: float, limits: Limits) -> Finding | None:
    """The rank that is behind where nobody has got on for longer than a step may last."""
    if not seen or any(each.beat.get("doing") != "step" for each in seen.values()):
        return None
    stuck = now - max(each.changed for each in seen.values())
    typical = max(each.beat["typical_s"] for each in seen.values())
    if stuck < (max(limits.silent_s, SLOW * typical) if typical else limits.step_s or math.inf):
        return None
    rank = min(seen, key=lambda rank: (seen[rank].beat["step"], seen[rank].beat["collectives"], rank))
    most = max(each.beat["collectives"] for each in seen.values())
    each = seen[rank]
    behind = most - each.beat["collectives"]
    who = f"rank {rank} ({each.host}, process {each.pid})"
    what = f"is behind the others by {behind} collectives" if behind else "is where all others are"
    text = f"nothing has happened for {stuck:.0f} s: {who} {what}, in {described(each.beat)}"
    return Finding("late", rank, stuck, text)


def described(beat: Mapping[str, Any]) -> str:
    """Where a rank is, in words."""
    after = f", after {beat['last']} (collective {beat['collectives']})" if beat.get("last") else ""
    doing = "" if beat.get("doing") == "step" else f"{beat.get('doing', 'start-up')}, "
    return f"{doing}step {beat.get('step', 0)}{after}"


class Listener:
    """Rank 0's side: takes beats, answers them, and tells what it finds, once per rank and silence."""

    def __init__(
        self, limits: Limits, tell: Callable[[Finding, str], None], clock: Callable[[], float] = time.monotonic
    ):
        """``tell(finding, stacks)`` is called from the listener's thread."""
        self.limits, self.tell, self.clock = limits, tell, clock
        self.seen: dict[int, Seen] = {}
        self.told: set[tuple[str, int]] = set()
        self.ended = self.wants_stacks = False
        self.connections: dict[int, socket.socket] = {}
        self.lock = threading.Lock()
        self.server = socket.create_server(("", 0), backlog=1024)
        self.port: int = self.server.getsockname()[1]
        for work in (self._accept, self._watch):
            threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self.ended = True
        with suppress(OSError):
            self.server.close()

    def beat(self, message: Mapping[str, Any]) -> None:
        """A rank was heard."""
        rank, now = int(message["rank"]), self.clock()
        with self.lock:
            if message.get("bye"):
                self.seen.pop(rank, None)
                return
            each = self.seen.get(rank)
            if each is None:
                each = self.seen[rank] = Seen(str(message["host"]), int(message["pid"]), now, now)
            beat = {key: message[key] for key in ("step", "doing", "collectives", "last", "typical_s")}
            if beat != each.beat:
                each.changed = now
            each.heard, each.beat = now, beat
            each.stack = message.get("stack", "")
            self.told.discard(("silent", rank))

    def look(self) -> Finding | None:
        """Tell what is new; returns what is bad enough to end the run."""
        with self.lock:
            now, seen = self.clock(), dict(self.seen)
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
        with self.lock:
            for each in self.seen.values():
                each.heard = each.changed = self.clock()

    def _watch(self) -> None:
        while not self.ended:
            if slept(BEAT_S / 2):
                self.forgive()
            finding = self.look()
            self._answer({"stack": self.wants_stacks, "end": finding.text if finding else ""})
            if finding:
                time.sleep(BEAT_S)  # the answers must leave
                os._exit(HUNG)

    def _answer(self, message: Mapping[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        for rank, connection in list(self.connections.items()):
            try:
                connection.sendall(line)
            except OSError:
                self.connections.pop(rank, None)

    def _accept(self) -> None:
        while not self.ended:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            connection.settimeout(BEAT_S)  # a stopped reader must not hold up the others
            threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        for message in messages(connection):
            self.connections[int(message["rank"])] = connection
            self.beat(message)


class Beater:
    """Every rank's side: sends its pulse and hears rank 0's answers."""

    def __init__(
        self,
        rank: int,
        pulse: Pulse,
        address: tuple[str, int],
        limits: Limits,
        tell: Callable[[Finding, str], None],
        main_thread: int,
    ) -> None:
        """``tell`` is called where rank 0 is silent, on the lowest of the other ranks."""
        self.rank, self.pulse, self.limits, self.tell, self.main_thread = rank, pulse, limits, tell, main_thread
        self.connection = socket.create_connection(address, timeout=30.0)
        self.connection.settimeout(BEAT_S)
        self.who = {"host": socket.gethostname(), "pid": os.getpid()}
        self.heard = time.monotonic()
        self.gives_stack = self.ended = self.told = False
        for work in (self._send, self._hear):
            threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        """Say goodbye: silence is meant from now on."""
        self.ended = True
        with suppress(OSError):
            self.connection.sendall(json.dumps({"rank": self.rank, "bye": True}).encode() + b"\n")
        with suppress(OSError):
            self.connection.close()

    def _send(self) -> None:
        while not self.ended:
            message = {**self.pulse.as_beat(self.rank), **self.who}
            if self.gives_stack:
                message["stack"] = stack_of(self.main_thread)
            with suppress(OSError):
                self.connection.sendall(json.dumps(message).encode() + b"\n")
            if slept(BEAT_S):
                self.heard = time.monotonic()
            self._watch_rank_0()

    def _watch_rank_0(self) -> None:
        quiet = time.monotonic() - self.heard
        if self.rank == 0 or self.ended or quiet < self.limits.silent_s:
            self.told = False
            return
        text = f"rank 0 has been silent for {quiet:.0f} s: it is stopped, frozen or cut off. This is rank {self.rank}, "
        finding = Finding("silent", 0, quiet, text + f"in {described(self.pulse.as_beat(self.rank))}")
        if not self.told and self.rank == 1:
            self.tell(finding, stack_of(self.main_thread))
        self.told = True
        if quiet >= self.limits.abort_s:
            os._exit(HUNG)

    def _hear(self) -> None:
        for message in messages(self.connection, lambda: self.ended):
            self.heard = time.monotonic()
            self.gives_stack = bool(message["stack"])
            if message["end"] and not self.ended:
                time.sleep(0.0 if self.rank else BEAT_S)
                os._exit(HUNG)


def slept(seconds: float) -> bool:
    """Sleep; whether it took so much longer that the whole process must have been stopped."""
    began = time.monotonic()
    time.sleep(seconds)
    return time.monotonic() - began > seconds + 3 * BEAT_S


def messages(connection: socket.socket, ended: Callable[[], bool] = lambda: False) -> Iterator[dict[str, Any]]:
    """Lines of JSON from a connection until it closes; silence is no end."""
    buffer = b""
    while not ended():
        try:
            data = connection.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            return
        if not data:
            return
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            yield json.loads(line)


def stack_of(thread: int) -> str:
    """The innermost frames of a thread, as text."""
    frame = sys._current_frames().get(thread)
    return "" if frame is None else "".join(traceback.format_stack(frame)[-STACK_FRAMES:])
