"""The figures of a step: their record in metrics.jsonl, the one line that people read, and the run's events."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megacore.monitor.console import Paint, human_count, human_time, plain
from megacore.monitor.jsonl import JsonLines, restored
from megacore.monitor.run_folder import EVENTS, METRICS


@dataclass(frozen=True)
class StepMetrics:
    """What is known after a step; the fields are the keys of metrics.jsonl, in their order.

    loss: mean over all tokens of the global batch, before the update. tokens: seen in total so far. mfu: share of
    the peak, 0 to 1, None where the peak is unknown. memory_gb: peak, 1e9 bytes. skipped: an
    update since the last record was left out because the gradient was not finite. val_loss: only where evaluated.
    statistics: norms by part of the model, fractions and, with FP8, its signal-to-noise ratios in dB by layer and
    product, only where they are due (see optim.statistics and parallel.fp8). gpu: what the ranks' GPUs did (see
    monitor.gpus), only where there are some.
    """

    step: int
    loss: float
    grad_norm: float | None
    lr: float
    tokens: int
    tokens_per_s: float | None = None
    step_time_s: float | None = None
    tflops_per_device: float | None = None
    mfu: float | None = None
    memory_gb: float | None = None
    skipped: bool = False
    val_loss: float | None = None
    statistics: dict[str, Any] | None = None
    gpu: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """The object for metrics.jsonl: unknown values are null; val_loss, statistics and gpu stand where known."""
        record = dict(vars(self))
        for name in ("val_loss", "statistics", "gpu"):
            if record[name] is None:
                del record[name]
        return record

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "StepMetrics":
        """From such an object as JSON holds it (see ``jsonl.finite``); what this version does not know is left out."""
        known = {each.name for each in fields(cls)}
        found = restored(copy.deepcopy(dict(record)))
        return cls(**{name: value for name, value in found.items() if name in known})


class MetricsWriter:
    """Appends a line per logged step to out/metrics.jsonl, floats in full precision (see jsonl.finite for NaN)."""

    def __init__(self, out: Path) -> None:
        self._lines = JsonLines(out / METRICS)

    def write(self, metrics: StepMetrics) -> None:
        """Appends one step."""
        self._lines.append(metrics.record())

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


class EventsWriter:
    """Appends what happens to a run (starts, saves, resumes, skips, samples, faults) to out/events.jsonl."""

    def __init__(self, out: Path) -> None:
        self._lines = JsonLines(out / EVENTS)
        self.listeners: list[Callable[[str, dict[str, Any]], None]] = []
        """Called with each event's name and details, after it is written."""

    def write(self, event: str, **details: Any) -> None:
        """Appends {"time": seconds since 1970, "event": event, **details}."""
        self._lines.append({"time": time.time(), "event": event, **details})
        for listen in self.listeners:
            listen(event, details)

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


def format_line(metrics: StepMetrics, total_steps: int, eta_s: float | None = None, paint: Paint = plain) -> str:
    """The one line about a step; fields keep their columns from step to step. Unknown figures are left out."""

    def field(label: str, value: str, *styles: str) -> str:
        return f"{paint(label, 'dim')} {paint(value, *styles) if styles else value}"

    width = len(str(total_steps))
    parts = [
        field("step", f"{metrics.step:>{width}}/{total_steps}"),
        field("loss", f"{metrics.loss:7.4f}", "bold"),
        field("lr", f"{metrics.lr:.2e}"),
    ]
    if metrics.grad_norm is not None:
        parts.append(
            field("grad", f"{metrics.grad_norm:6.3f}" if metrics.grad_norm < 100 else f"{metrics.grad_norm:6.0f}")
        )
    if metrics.tokens_per_s is not None:
        parts.append(f"{human_count(metrics.tokens_per_s):>5} {paint('tok/s', 'dim')}")
    if metrics.tflops_per_device is not None:
        parts.append(f"{_tflops(metrics.tflops_per_device)} {paint('TFLOP/s', 'dim')}")
    if metrics.mfu is not None:
        parts.append(field("mfu", f"{metrics.mfu:5.1%}"))
    if metrics.memory_gb is not None:
        parts.append(f"{metrics.memory_gb:.2f} {paint('GB', 'dim')}")
    if eta_s is not None:
        parts.append(field("eta", f"{human_time(eta_s):>6}"))
    if metrics.val_loss is not None:
        parts.append(field("val", f"{metrics.val_loss:.4f}", "green", "bold"))
    if metrics.skipped:
        parts.append(paint("skipped", "yellow", "bold"))
    return "  ".join(parts)


def _tflops(value: float) -> str:
    return f"{value:5.3f}" if value < 1 else f"{value:5.1f}"
