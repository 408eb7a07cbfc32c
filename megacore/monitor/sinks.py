"""Where alerts go beyond the log: a web hook, a command. One thread sends them; training never waits for it."""

import json
import os
import queue
import shlex
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError

from megacore.config.secrets import HIDDEN
from megacore.monitor.jsonl import finite

TIMEOUT_S = 10.0
MOST_WAITING = 100
"""Alerts beyond that are dropped: whoever is to hear of them does not answer."""

Send = Callable[[bytes], None]
Alert = Mapping[str, Any]


class _Stays(urllib.request.HTTPRedirectHandler):
    """urllib would follow with a GET, without the alert, and take that for success."""

    def redirect_request(self, *told: Any) -> None:
        """Go nowhere: an HTTPError with the code is raised."""


def webhook(url: str) -> Send:
    """POSTs the JSON. Raises OSError where that fails, which says nothing of the URL: its path is a password."""
    opener = urllib.request.build_opener(_Stays)

    def send(body: bytes) -> None:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
        try:
            with opener.open(request, timeout=TIMEOUT_S) as answer:
                answer.read(1)
        except HTTPError as error:
            error.close()
            elsewhere = "; give the address that it leads to" if 300 <= error.code < 400 else ""
            raise OSError(f"it answered with HTTP {error.code}{elsewhere}") from None
        except URLError as error:
            known = isinstance(error.reason, OSError)
            raise OSError(str(error.reason) if known else type(error).__name__) from None
        except TimeoutError:
            raise OSError(f"no answer within {TIMEOUT_S:g} s") from None
        except (ValueError, HTTPException) as error:
            raise OSError(type(error).__name__) from None

    return send


def command(line: str) -> Send:
    """Runs a command, without a shell, with the JSON on its stdin. Raises OSError where it fails or takes too long; of
    its words and of what it prints that says nothing, for they may hold secrets."""
    words = shlex.split(line)

    def send(body: bytes) -> None:
        try:
            # nothing is read from it, so nobody waits for what it may have started; a group of its own can be ended
            process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise OSError(f"it cannot be started: {error.strerror}") from None
        try:
            process.communicate(body, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise OSError(f"it did not end within {TIMEOUT_S:g} s, and was killed") from None
        if process.returncode:
            raise OSError(f"it ended with exit code {process.returncode}; what it prints is not kept")

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
            self.waiting.put_nowait(json.dumps(finite(dict(alert)), default=str).encode())
            self.silent.discard("alerts")
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
                except OSError as error:
                    self._tell(name, str(error))

    def _tell(self, name: str, reason: str) -> None:
        if name not in self.silent:
            self.silent.add(name)
            self.failed(name, reason)


def targets_of(hook: str, line: str) -> dict[str, Send]:
    """By the keys of the run that name them."""
    found: dict[str, Send] = {}
    if hook not in ("", HIDDEN):
        found["log.alert_webhook"] = webhook(hook)
    if line not in ("", HIDDEN):
        found["log.alert_command"] = command(line)
    return found
