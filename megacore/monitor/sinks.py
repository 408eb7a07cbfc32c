"""Where alerts go beyond the log: a web hook, a command. One thread sends them; training never waits for it."""

import json
import queue
import shlex
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException
from typing import Any

TIMEOUT_S = 10.0
MOST_WAITING = 100
"""Alerts beyond that are dropped: whoever is to hear of them does not answer."""

Send = Callable[[bytes], None]
Alert = Mapping[str, Any]


def webhook(url: str) -> Send:
    """POSTs the JSON. Raises OSError where that fails."""

    def send(body: bytes) -> None:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            answer.read(1)

    return send


def command(line: str) -> Send:
    """Runs a command, without a shell, with the JSON on its stdin. Raises OSError or SubprocessError where it fails."""
    words = shlex.split(line)

    def send(body: bytes) -> None:
        subprocess.run(words, input=body, timeout=TIMEOUT_S, check=True, capture_output=True)

    return send


class Outbox:
    """Alerts on their way. ``failed`` is called from the thread, with what did not arrive and why, once per target
    until one arrives again."""

    def __init__(self, targets: Mapping[str, Send], failed: Callable[[str, str], None]) -> None:
        self.targets, self.failed = dict(targets), failed
        self.silent: set[str] = set()
        self.waiting: queue.Queue[bytes | None] = queue.Queue(MOST_WAITING)
        self.thread = threading.Thread(target=self._work, name="alerts", daemon=True) if targets else None
        if self.thread:
            self.thread.start()

    def put(self, alert: Alert) -> None:
        """Send it soon. Never waits."""
        if self.thread is None:
            return
        try:
            self.waiting.put_nowait(json.dumps(alert, default=str).encode())
        except queue.Full:
            self._tell("alerts", f"{MOST_WAITING} alerts wait already; this one is dropped")

    def close(self, seconds: float = TIMEOUT_S) -> None:
        """Wait for what is on its way, but no longer than that."""
        if self.thread is None:
            return
        until = time.monotonic() + seconds
        try:
            self.waiting.put(None, timeout=seconds)
        except queue.Full:
            return
        self.thread.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        while (body := self.waiting.get()) is not None:
            for name, send in self.targets.items():
                try:
                    send(body)
                    self.silent.discard(name)
                except (OSError, ValueError, HTTPException, subprocess.SubprocessError) as error:
                    self._tell(name, str(error))

    def _tell(self, name: str, reason: str) -> None:
        if name not in self.silent:
            self.silent.add(name)
            self.failed(name, reason)


def targets_of(hook: str, line: str) -> dict[str, Send]:
    """By the keys of the run that name them."""
    found: dict[str, Send] = {}
    if hook:
        found["log.alert_webhook"] = webhook(hook)
    if line:
        found["log.alert_command"] = command(line)
    return found
