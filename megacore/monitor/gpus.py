"""What each rank's own GPU does, sampled by a thread through NVML; joined over ranks where a step is written down.

Never run here on a machine with GPUs: the names of NVML's functions are held against nvidia-ml-py, their meaning is its
documentation's.
"""

import importlib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from megacore.config.alerts import GPU_FIGURES

SLOWED = (("hardware slowdown", 0x8), ("hot", 0x20), ("hardware hot", 0x40), ("power brake", 0x80))
"""Reasons for lowered clocks that are no part of usual work (nvmlClocksEventReasons); the power limit (0x4) is."""
FIELDS = (*GPU_FIGURES, "reasons")
"""One rank's numbers, NaN where not known: utilization and memory_used are shares, slowed is 0 or 1, reasons bits."""
UNKNOWN = (math.nan,) * len(FIELDS)
Row = tuple[float, ...]


class Sampler:
    """Of one GPU. Samples are means over the time between two readings (heat: the most, errors: the newest)."""

    def __init__(
        self, nvml: Any, handle: Any, every_s: float, clock: Callable[[], float] = time.monotonic, runs: bool = True
    ) -> None:
        """``runs``: in a thread, every so many seconds; else `sample` is called by whoever made it."""
        self.nvml, self.handle, self.every_s, self.clock = nvml, handle, every_s, clock
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.samples: list[Row] = []
        self.last: Row = UNKNOWN
        self.energy: tuple[float, float] | None = None
        """Joules since the driver started, and when."""
        self.sample()
        if runs:
            threading.Thread(target=self._work, name="gpu", daemon=True).start()

    def read(self) -> Row:
        """FIELDS since the last reading; the same again where there was no sample since. Asks the GPU nothing."""
        with self.lock:
            if self.samples:
                self.last = _summary(self.samples)
                self.samples = []
            return self.last

    def sample(self) -> None:
        """Ask the GPU once: about ten calls of NVML."""
        n, handle = self.nvml, self.handle
        rates = self._ask(lambda: float(n.nvmlDeviceGetUtilizationRates(handle).gpu))
        memory = self._ask(lambda: _share(n.nvmlDeviceGetMemoryInfo(handle)))
        heat = self._ask(lambda: float(n.nvmlDeviceGetTemperature(handle, n.NVML_TEMPERATURE_GPU)))
        clock = self._ask(lambda: float(n.nvmlDeviceGetClockInfo(handle, n.NVML_CLOCK_SM)))
        errors = self._ask(
            lambda: float(
                n.nvmlDeviceGetTotalEccErrors(handle, n.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, n.NVML_VOLATILE_ECC)
            )
        )
        reasons = self._ask(lambda: float(n.nvmlDeviceGetCurrentClocksThrottleReasons(handle)))
        slowed = math.nan if math.isnan(reasons) else float(any(int(reasons) & bit for _, bit in SLOWED))
        row = (rates / 100, memory, self._power(), heat, clock, errors, slowed, reasons)
        with self.lock:
            self.samples.append(row)

    def close(self) -> None:
        """Sample no longer."""
        self.ended.set()

    def _power(self) -> float:
        """Watts since the last sample, by the energy counter; where there is none, those of now."""
        joules, now = self._ask(lambda: self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1000), self.clock()
        before, self.energy = self.energy, None if math.isnan(joules) else (joules, now)
        if before is not None and self.energy is not None and now > before[1] and joules >= before[0]:
            return (joules - before[0]) / (now - before[1])
        return self._ask(lambda: self.nvml.nvmlDeviceGetPowerUsage(self.handle) / 1000)

    def _ask(self, question: Callable[[], float]) -> float:
        """NaN where this kind of GPU has no answer."""
        try:
            return question()
        except self.nvml.NVMLError:
            return math.nan

    def _work(self) -> None:
        while not self.ended.wait(self.every_s):
            self.sample()


def open_sampler(uuid: str, every_s: float, module: str = "pynvml") -> tuple[Sampler | None, str]:
    """A sampler of the GPU that torch calls ``uuid``, or None and why."""
    try:
        nvml: Any = importlib.import_module(module)
    except ImportError:
        return None, 'nvidia-ml-py is not installed: pip install "megacore[monitor]"'
    try:
        nvml.nvmlInit()
        bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
        handle = None
        for kind in ("GPU-", "MIG-"):
            with suppress(nvml.NVMLError):
                handle = handle or nvml.nvmlDeviceGetHandleByUUID(kind + bare)
        if handle is None:
            return None, f"NVML does not know the GPU {uuid}"
        return Sampler(nvml, handle, every_s), ""
    except nvml.NVMLError as error:
        return None, str(error)


def joined(rows: Sequence[Row], tokens_per_s: float | None) -> dict[str, Any] | None:
    """All ranks' FIELDS as metrics.jsonl has them: mean, least and most of each; which ranks are slowed, and why;
    joules per token. None where nothing is known of any GPU."""
    found: dict[str, Any] = {}
    for place, name in enumerate(GPU_FIGURES):
        known = [row[place] for row in rows if not math.isnan(row[place])]
        if known:
            found[name] = {"mean": sum(known) / len(known), "min": min(known), "max": max(known)}
            if name == "power_w" and tokens_per_s and len(known) == len(rows):
                found["joules_per_token"] = sum(known) / tokens_per_s
    bits = [0 if math.isnan(row[-1]) else int(row[-1]) for row in rows]
    slow = {text: [rank for rank, each in enumerate(bits) if each & bit] for text, bit in SLOWED}
    if any(slow.values()):
        found["slowed_ranks"] = {text: ranks for text, ranks in slow.items() if ranks}
    return found or None


def _share(memory: Any) -> float:
    return float(memory.used) / float(memory.total)


def _summary(samples: Sequence[Row]) -> Row:
    """Means; of heat and of being slowed the most, of errors the newest, of reasons all bits."""
    by = {name: [row[place] for row in samples if not math.isnan(row[place])] for place, name in enumerate(FIELDS)}
    of: Mapping[str, Callable[[list[float]], float]] = {
        "temperature_c": max,
        "slowed": max,
        "ecc_errors": lambda values: values[-1],
        "reasons": lambda values: float(_all_bits(values)),
    }
    return tuple(of.get(name, _mean)(by[name]) if by[name] else math.nan for name in FIELDS)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _all_bits(values: Sequence[float]) -> int:
    found = 0
    for value in values:
        found |= int(value)
    return found
