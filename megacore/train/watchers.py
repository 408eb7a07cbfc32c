"""What looks on from outside while a run goes on: trackers, alerts and where these are sent. On rank 0."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megacore.config.schema import RunConfig
from megacore.config.secrets import SECRETS
from megacore.config.write import flatten
from megacore.monitor.alerts import Alerts
from megacore.monitor.console import Console
from megacore.monitor.metrics import EventsWriter, StepMetrics
from megacore.monitor.sinks import Outbox, targets_of
from megacore.monitor.trackers import open_trackers

ALERT, ALERT_OVER, UNSENT = "alert", "alert_over", "alert_not_sent"
OWN = (ALERT, ALERT_OVER, UNSENT)


class Watchers:
    """Of one run, from one start or return to the next."""

    def __init__(self, config: RunConfig, console: Console, events: EventsWriter, first_step: int | None) -> None:
        """``first_step`` of a run that is taken up again."""
        self.console, self.events, log = console, events, config.log
        self.known = {"run": config.out, "host": platform.node()}
        self.flat = {key: value for key, value in flatten(config).items() if key not in SECRETS}
        self.saved = 0 if first_step is None else first_step - 1
        self.saves = config.checkpoint.save_every > 0
        self.clip_grad = config.optim.clip_grad if config.optim.clip == "norm" and config.optim.clip_grad > 0 else None
        self.trackers = open_trackers(Path(config.out), config, self.flat, self.warn, first_step)
        self.outbox = Outbox(targets_of(log.alert_webhook, log.alert_command), self.unsent)
        self.alerts = Alerts(log.alerts, self.tell)
        events.listeners.append(self.hear)

    def log(self, metrics: StepMetrics, memory_headroom: float | None = None) -> None:
        """A step was written down."""
        for tracker in self.trackers:
            tracker.log(metrics)
        more = {"clip_grad": self.clip_grad, "memory_headroom": memory_headroom}
        since = {"steps_since_save": metrics.step - self.saved if self.saves else None}
        self.alerts.see(metrics.step, {**vars(metrics), **more, **since})

    def text(self, tag: str, text: str, step: int) -> None:
        """The model has written something."""
        for tracker in self.trackers:
            tracker.text(tag, text, step)

    def hear(self, event: str, facts: Mapping[str, Any]) -> None:
        """Something was written to events.jsonl."""
        for tracker in self.trackers:
            tracker.event(event, facts)
        if event == "save":
            self.saved = int(facts["step"])
        if event not in OWN:
            self.alerts.event(event, facts)

    def tell(self, event: str, facts: dict[str, Any]) -> None:
        """An alert, or its end."""
        self.events.write(event, **facts)
        self.outbox.put({"event": event, **self.known, **facts})
        if not str(facts["alert"]).startswith("event "):  # of those the console was told where they happened
            over = event == ALERT_OVER
            word, style = ("alert is over", "dim") if over else ("alert", "yellow")
            said = f"{facts['alert']} (since step {facts['since_step']})" if over else facts["text"]
            self.console.line(f"{self.console.paint(word, style)}  step {facts['step']}: {said}")

    def warn(self, text: str) -> None:
        """A tracker has failed. (Called from its thread.)"""
        self.console.line(f"{self.console.paint('warning', 'yellow', 'bold')}  {text}")
        self.events.write("warning", text=text)

    def unsent(self, target: str, reason: str) -> None:
        """An alert did not arrive. (Called from the thread that sends.)"""
        text = f"{target}: an alert did not arrive: {reason}"
        self.console.line(f"{self.console.paint('warning', 'yellow', 'bold')}  {text}")
        self.events.write(UNSENT, target=target, reason=reason)

    def close(self) -> None:
        """Send what is on its way, and let go."""
        self.events.listeners.clear()
        self.outbox.close()
        for tracker in self.trackers:
            tracker.close()
