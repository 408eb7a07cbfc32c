"""What Prometheus reads: the newest figures in its text format, over HTTP or as a file.

Format: "Exposition formats", version 0.0.4, prometheus.io. The file is for node_exporter's textfile collector.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from megacore.monitor.metrics import StepMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "megacore_"
GAUGE, COUNTER = "gauge", "counter"
FIGURES = (
    ("step", "step", GAUGE, 1, "last step that was written down"),
    ("loss", "loss", GAUGE, 1, "mean over the tokens of the global batch"),
    ("grad_norm", "grad_norm", GAUGE, 1, "global norm of gradients before clipping"),
    ("lr", "learning_rate", GAUGE, 1, "learning rate"),
    ("tokens", "tokens_total", COUNTER, 1, "tokens trained on so far"),
    ("tokens_per_s", "tokens_per_second", GAUGE, 1, "tokens per second over all ranks"),
    ("step_time_s", "step_time_seconds", GAUGE, 1, "mean time of a step"),
    ("tflops_per_device", "flops_per_device", GAUGE, 1e12, "floating-point operations per second and device"),
    ("mfu", "model_flops_utilization_ratio", GAUGE, 1, "share of the devices' peak"),
    ("memory_gb", "memory_peak_bytes", GAUGE, 1e9, "peak memory of the rank that needed most"),
    ("val_loss", "validation_loss", GAUGE, 1, "cross-entropy on validation data"),
)
"""Field of StepMetrics, name, type, factor, help."""


class Exposition:
    """The newest figures as text. Several threads may use it."""

    def __init__(self, run: str) -> None:
        self.run, self.lock = run, threading.Lock()
        self.figures: dict[str, float] = {}
        self.gpu: dict[tuple[str, str], float] = {}
        self.events: Counter[str] = Counter()
        self.alerts: dict[str, int] = {}
        self.told_at = time.time()

    def log(self, metrics: StepMetrics) -> None:
        """Takes the figures of one step."""
        with self.lock:
            self.told_at = time.time()
            for field, name, _, factor, _ in FIGURES:
                value = getattr(metrics, field)
                if value is not None:
                    self.figures[name] = value * factor
            for name, figure in (metrics.gpu or {}).items():
                parts = figure if isinstance(figure, Mapping) else {"": figure}
                self.gpu |= {(name, part): value for part, value in parts.items() if isinstance(value, (int, float))}

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """Counts it; alerts are 1 while they last."""
        with self.lock:
            self.events[name] += 1
            if name in ("alert", "alert_over"):
                self.alerts[str(facts.get("alert"))] = int(name == "alert")

    def render(self) -> str:
        """Everything, in the text format."""
        with self.lock:
            return "".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for _, name, kind, _, meaning in FIGURES:
            if name in self.figures:
                yield self._family(name, kind, meaning) + self._sample(name, self.figures[name])
        for figure in dict.fromkeys(name for name, _ in self.gpu):
            yield self._family(f"gpu_{figure}", GAUGE, f"{figure} of the ranks' GPUs")
            for (name, part), value in self.gpu.items():
                if name == figure:
                    yield self._sample(f"gpu_{name}", value, **({"over_ranks": part} if part else {}))
        yield self._family("last_record_timestamp_seconds", GAUGE, "when a step was last written down")
        yield self._sample("last_record_timestamp_seconds", self.told_at)
        yield self._family("events_total", COUNTER, "events since this process began")
        for name, count in self.events.items():
            yield self._sample("events_total", count, event=name)
        yield self._family("alert_active", GAUGE, "1 while an alert lasts")
        for alert, active in self.alerts.items():
            yield self._sample("alert_active", active, alert=alert)

    def _family(self, name: str, kind: str, meaning: str) -> str:
        return f"# HELP {PREFIX}{name} {meaning}\n# TYPE {PREFIX}{name} {kind}\n"

    def _sample(self, name: str, value: float, **labels: str) -> str:
        inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in {"run": self.run, **labels}.items())
        return f"{PREFIX}{name}{{{inside}}} {_number(value)}\n"


class Server:
    """GET /metrics, from a thread. Raises OSError where the port is taken."""

    def __init__(self, exposition: Exposition, port: int, host: str = "") -> None:
        self.exposition = exposition

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                known = self.path.partition("?")[0] in ("/metrics", "/")
                body = exposition.render().encode() if known else b"look at /metrics\n"
                self.send_response(200 if known else 404)
                self.send_header("Content-Type", CONTENT_TYPE if known else "text/plain")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Says nothing on the run's console."""

        self.server = ThreadingHTTPServer((host, port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.2,), name="prometheus", daemon=True)
        self.thread.start()

    def log(self, metrics: StepMetrics) -> None:
        """Takes the figures of one step."""
        self.exposition.log(metrics)

    def text(self, tag: str, text: str, step: int) -> None:
        """Has no place for it."""

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """Counts it."""
        self.exposition.event(name, facts)

    def close(self) -> None:
        """Serve no longer."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class TextFile:
    """The same as a file that is whole at any time. Not synced to disk: it is stale in a minute anyway."""

    def __init__(self, exposition: Exposition, path: Path) -> None:
        self.exposition, self.path = exposition, path

    def log(self, metrics: StepMetrics) -> None:
        """Takes the figures of one step."""
        self.exposition.log(metrics)
        self._write()

    def text(self, tag: str, text: str, step: int) -> None:
        """Has no place for it."""

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """Counts it."""
        self.exposition.event(name, facts)
        self._write()

    def close(self) -> None:
        """Leaves the last figures."""
        self._write()

    def _write(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.writing")
        temporary.write_text(self.exposition.render(), encoding="utf-8")
        os.replace(temporary, self.path)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    """As Go reads it."""
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)
