"""torch's profiler over some steps: a trace that viewers know (ui.perfetto.dev), and what the time went into."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megacore.monitor.kinds import Event, by_instruction, by_kind


@dataclass(frozen=True)
class Profiled:
    """One rank's time over the profiled steps, in milliseconds."""

    span_ms: float
    kinds: dict[str, float]
    instructions: dict[str, float]
    """Of each op."""


class Profile:
    """Begun before a step and ended after one. The host records its operations, CUDA its kernels."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self.profiler = profile(activities=activities)
        self.profiler.start()

    def end(self, trace: Path) -> Profiled:
        """Write the trace to ``trace`` (.json or .json.gz) and say what the time went into; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.profiler.stop()
        trace.parent.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(trace))
        return profiled(self.profiler.events(), self.device.type == "cuda")

    def drop(self) -> None:
        """End it without a word."""
        self.profiler.stop()


def profiled(events: Sequence[Any], on_device: bool) -> Profiled:
    """What the profiler's ``events`` say. On the CPU what lies within steps counts, on the thread that walks them; on a
    device all kernels, whatever thread launched them (backward has one of its own there)."""
    steps = [each for each in events if each.name.startswith("step ") and each.device_type.name == "CPU"]
    begin, end = min(each.time_range.start for each in steps), max(each.time_range.end for each in steps)
    main = tree_of((each for each in events if each.thread == steps[0].thread), False)
    in_steps = [each for each in main if each.name.startswith("step ")]
    counted = in_steps
    if on_device:
        threads = {each.thread for each in events}
        counted = [root for thread in threads for root in tree_of((e for e in events if e.thread == thread), True)]
    return Profiled((end - begin) / 1000, by_kind(counted, end - begin), by_instruction(in_steps))


def tree_of(events: Iterable[Any], on_device: bool) -> list[Event]:
    """One thread's events, each with those that lie within it; ``on_device``: their time is that of the kernels that
    they launched. A message under way (gloo:send) is no work of the thread, and other events overlap with it."""
    host = [
        each
        for each in events
        if each.device_type.name == "CPU" and not each.is_async and not each.name.startswith(("gloo:", "nccl:"))
    ]
    host.sort(key=lambda each: (each.time_range.start, -each.time_range.end))
    roots: list[_Open] = []
    path: list[_Open] = []
    for event in host:
        start, end = event.time_range.start, event.time_range.end
        while path and path[-1].end <= start:
            path.pop()
        opened = _Open(event, end)
        if path:
            path[-1].within.append(opened)
            path[-1].inner_us += min(end, path[-1].end) - start
        else:
            roots.append(opened)
        path.append(opened)
    return [each.closed(on_device) for each in roots]


@dataclass
class _Open:
    """An event while what lies within it is being found."""

    event: Any
    end: float
    inner_us: float = 0.0
    within: list["_Open"] = field(default_factory=list)

    def closed(self, on_device: bool) -> Event:
        within = tuple(each.closed(on_device) for each in self.within)
        if not on_device:
            return Event(self.event.name, max(0.0, self.event.time_range.elapsed_us() - self.inner_us), within)
        # ranges of our own are among the device's events, too, under the same names
        kernels = [float(kernel.duration) for kernel in self.event.kernels if kernel.name != self.event.name]
        return Event(self.event.name, sum(kernels), within)
