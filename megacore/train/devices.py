"""What the ranks' devices say of themselves, joined on rank 0 where a step is written down."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megacore.mesh.collectives import all_gather, all_reduce
from megacore.mesh.mesh import ParallelMesh
from megacore.monitor.gpus import UNKNOWN, Sampler, joined, open_sampler
from megacore.monitor.memory import GB, peak_memory_gb

PEAK_EVERY = 10
"""Steps for which a peak of main memory is taken to be the newest: it hardly moves, and a message takes time."""


class Devices:
    """Of all ranks. Asking is collective and never waits for the device; reading, a step later, finds it there."""

    def __init__(self, mesh: ParallelMesh, every_s: float, sampler: Sampler | None = None) -> None:
        """``every_s``: between samples of every rank's GPU; 0: none. On CPUs there is nothing to sample, unless a
        ``sampler`` is given."""
        self.mesh, self.sampler, self.reason = mesh, sampler, ""
        # by the run alone: where one rank's NVML is missing, it still takes part
        self.joins = sampler is not None or (mesh.device.type == "cuda" and every_s > 0)
        self.answer: Tensor | None = None
        self.asked_at = 0
        """The step."""
        self.total_gb: float | None = None
        self.name = "CPU"
        if mesh.device.type == "cuda":
            properties = torch.cuda.get_device_properties(mesh.device)
            self.total_gb, self.name = properties.total_memory / GB, properties.name
            if self.joins and sampler is None:
                self.sampler, self.reason = open_sampler(str(properties.uuid), every_s)

    @property
    def asked(self) -> bool:
        """Whether there is something to read."""
        return self.answer is not None

    def ask(self, step: int) -> None:
        """Take every rank's peak memory and GPU together: one message of 9 numbers of each rank where there are GPUs,
        else, once in a while, the largest peak."""
        device = self.mesh.device
        wait = min(self.asked_at, PEAK_EVERY) if device.type == "cpu" and not self.joins else 1
        if self.asked_at < step < self.asked_at + wait:  # the first steps, in which a run grows, ask more often
            return
        self.asked_at = step
        peak = peak_memory_gb(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None)
        if not self.joins:
            self.answer = all_reduce(torch.full((), peak, dtype=torch.float64, device=device), self.mesh.world, "max")
            return
        row = (peak, *(UNKNOWN if self.sampler is None else self.sampler.read()))
        own = torch.tensor([row], dtype=torch.float64)
        if device.type == "cuda":  # from pinned memory: any other copy would wait for the steps in flight
            own = own.pin_memory().to(device, non_blocking=True)
        self.answer = all_gather(own, self.mesh.world)

    def read(self, tokens_per_s: float | None) -> tuple[float, dict[str, Any] | None]:
        """The peak of the rank that has needed most, in GB, and what the GPUs did, if there are any."""
        assert self.answer is not None, "ask comes before read"
        if not self.joins:
            return self.answer.item(), None
        rows = self.answer.tolist()
        return max(row[0] for row in rows), joined([tuple(row[1:]) for row in rows], tokens_per_s)

    def headroom(self, memory_gb: float | None) -> float | None:
        """The share of a GPU's memory that torch has not needed yet."""
        return None if self.total_gb is None or memory_gb is None else 1 - memory_gb / self.total_gb

    def close(self) -> None:
        """Sample no longer."""
        if self.sampler is not None:
            self.sampler.close()
