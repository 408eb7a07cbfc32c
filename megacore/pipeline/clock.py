"""Points in time, on the host or among a device's work."""

from __future__ import annotations

import time

import torch


class Mark:
    """A point in the device's work. The CPU works at once; CUDA later, so there it is an event among the work."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event is not None:
            self.event.record(torch.cuda.current_stream(device))
        self.time = time.perf_counter()

    def seconds_since(self, earlier: Mark) -> float:
        """How long the device took from ``earlier`` to here, once it has come here."""
        if self.event is None or earlier.event is None:
            return self.time - earlier.time
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000
