"""A tracker in a thread of its own: whatever it waits for, and however it fails, training goes on."""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from megacore.monitor.metrics import StepMetrics

MOST_WAITING = 10_000
CLOSING_S = 30.0


class Background:
    """Passes on what it is told, in order. A tracker that fails is heard of once and then left alone."""

    def __init__(self, name: str, make: Callable[[], Any], warn: Callable[[str], None]) -> None:
        """``make`` opens the tracker, in the thread; ``warn`` is called from there."""
        self.name, self.make, self.warn = name, make, warn
        self.waiting: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(MOST_WAITING)
        self.failed = self.full = False
        self.thread = threading.Thread(target=self._work, name=name, daemon=True)
        self.thread.start()

    def log(self, metrics: StepMetrics) -> None:
        """Takes the figures of one step."""
        self._put("log", metrics)

    def text(self, tag: str, text: str, step: int) -> None:
        """Takes a text."""
        self._put("text", tag, text, step)

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """Takes an event."""
        self._put("event", name, dict(facts))

    def drain(self) -> None:
        """Waits until everything is passed on; for measurements."""
        self.waiting.join()

    def close(self) -> None:
        """Waits for what is on its way, but not for ever."""
        until = time.monotonic() + CLOSING_S
        with suppress(queue.Full):
            self.waiting.put(("close", ()), timeout=CLOSING_S)
        self.thread.join(max(0.0, until - time.monotonic()))
        if self.thread.is_alive():
            self._tell(f"did not take everything within {CLOSING_S:.0f} s")

    def _put(self, *told: Any) -> None:
        if self.failed:
            return
        try:
            self.waiting.put_nowait((told[0], told[1:]))
        except queue.Full:
            if not self.full:
                self.full = True
                self._tell(f"is too slow: {MOST_WAITING} figures wait for it, and some are dropped")

    def _work(self) -> None:
        tracker, method = None, ""
        while method != "close":
            try:
                tracker = self.make() if tracker is None and not self.failed else tracker
                method, told = self.waiting.get()
                if not self.failed:
                    getattr(tracker, method)(*told)
            except Exception as error:  # a foreign program's, of any kind: it must not end the run
                self.failed = True
                self._tell(f"gets nothing from here on: {type(error).__name__}: {error}")
                if tracker is None:
                    continue  # nothing was taken yet
            self.waiting.task_done()

    def _tell(self, what: str) -> None:
        self.warn(f"{self.name} {what}")
