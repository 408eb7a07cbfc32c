"""Figures of GPUs: what a made-up NVML says becomes what metrics.jsonl has. The real module has every name used."""

import ast
import inspect
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from megacore.config.alerts import GPU_FIGURES, GPU_NAMES
from megacore.monitor import gpus
from megacore.monitor.gpus import FIELDS, UNKNOWN, Sampler, joined, open_sampler


class NotSupported(Exception):
    """In place of NVMLError."""


class Nvml:
    """One GPU."""

    NVMLError = NotSupported
    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = range(4)

    def __init__(self) -> None:
        self.busy, self.heat, self.reasons, self.millijoules, self.milliwatts = 90, 60, 0x4, 1_000_000, 650_000
        self.has_ecc = True
        self.ended = False

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "GPU-123":
            raise NotSupported("not found")
        return "handle"

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=self.busy)

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=60, total=80)

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return self.heat

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return 1980

    def nvmlDeviceGetTotalEccErrors(self, handle, kind, counter):
        if not self.has_ecc:
            raise NotSupported("no ECC")
        return 2

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self.reasons

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if self.millijoules is None:
            raise NotSupported("no counter")
        return self.millijoules

    def nvmlDeviceGetPowerUsage(self, handle):
        return self.milliwatts


def as_dict(row):
    return dict(zip(FIELDS, row, strict=True))


def sampler_of(nvml, times):
    clock = iter(times)
    return Sampler(nvml, "handle", 1.0, lambda: next(clock), runs=False)


def test_samples_are_means_over_the_time_between_readings():
    nvml = Nvml()
    sampler = sampler_of(nvml, [0.0, 2.0, 4.0, 6.0])
    first = as_dict(sampler.read())
    assert first == {
        "utilization": 0.9, "memory_used": 0.75, "power_w": 650.0, "temperature_c": 60.0, "sm_clock_mhz": 1980.0,
        "ecc_errors": 2.0, "slowed": 0.0, "reasons": 4.0,
    }  # fmt: skip
    nvml.millijoules += 1_000_000
    nvml.busy, nvml.heat = 100, 90
    sampler.sample()
    nvml.millijoules += 500_000
    nvml.busy, nvml.heat, nvml.reasons = 50, 70, 0x40
    sampler.sample()
    second = as_dict(sampler.read())
    assert second["power_w"] == pytest.approx((500 + 250) / 2)  # 1,000 J and 500 J in 2 s each
    assert (second["utilization"], second["temperature_c"], second["slowed"]) == (0.75, 90.0, 1.0)
    assert second["reasons"] == 0x44
    assert as_dict(sampler.read()) == second  # nothing new


def test_what_a_gpu_cannot_tell_is_not_known():
    nvml = Nvml()
    nvml.has_ecc, nvml.millijoules = False, None
    sampler = sampler_of(nvml, [0.0, 1.0])
    sampler.sample()
    found = as_dict(sampler.read())
    assert math.isnan(found["ecc_errors"])
    assert found["power_w"] == 650.0  # of now, where energy is not counted


def test_ranks_are_joined():
    row = dict(zip(FIELDS, (0.9, 0.5, 400.0, 60.0, 1900.0, 0.0, 0.0, 4.0), strict=True))
    rows = [tuple(row.values()), tuple({**row, "power_w": 600.0, "slowed": 1.0, "reasons": 0x60}.values())]
    found = joined(rows, tokens_per_s=2000.0)
    assert found["power_w"] == {"mean": 500.0, "min": 400.0, "max": 600.0}
    assert found["joules_per_token"] == 0.5
    assert found["slowed_ranks"] == {"hot": [1], "hardware hot": [1]}
    names = {f"gpu.{name}.{part}" for name in GPU_FIGURES for part in found[name]} | {"gpu.joules_per_token"}
    assert names == set(GPU_NAMES)
    some = joined([rows[0], UNKNOWN], 2000.0)
    assert some["power_w"]["mean"] == 400.0
    assert "joules_per_token" not in some  # of half of the GPUs it would be wrong
    assert joined([UNKNOWN, UNKNOWN], 2000.0) is None


def test_the_gpu_is_found_by_what_torch_calls_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    sampler, reason = open_sampler("123", 1000.0)
    assert (as_dict(sampler.read())["utilization"], reason) == (0.9, "")
    sampler.close()
    assert open_sampler("456", 1.0) == (None, "NVML does not know the GPU 456")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    sampler, reason = open_sampler("123", 1.0)
    assert sampler is None
    assert "pip install" in reason


def test_without_a_driver_there_is_a_reason():
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        assert open_sampler("123", 1.0) == (None, str(error))
    else:
        assert open_sampler("123", 1.0)[0] is None  # a driver, which has no such GPU


def test_every_name_is_one_of_nvidia_ml_py():
    """Called as there: the module is held against its own source, since there is no GPU to call it for."""
    tree = ast.parse(Path(gpus.__file__).read_text())
    used = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.lower().startswith("nvml")
    } - {"nvml"}
    assert len(used) >= 12
    assert not [name for name in used if not hasattr(pynvml, name)]
    made_up = {name for name in vars(Nvml) if name.lower().startswith("nvml")} | {"NVMLError"}
    assert used == made_up
    for name in made_up - {"NVMLError"}:
        own, real = getattr(Nvml(), name), getattr(pynvml, name)
        if callable(own):
            inspect.signature(real).bind(*inspect.signature(own).parameters)
    bits = {"hardware slowdown": "HwSlowdown", "hot": "SwThermalSlowdown", "hardware hot": "HwThermalSlowdown"}
    bits["power brake"] = "HwPowerBrakeSlowdown"
    for text, bit in gpus.SLOWED:
        assert getattr(pynvml, f"nvmlClocksThrottleReason{bits[text]}") == bit
