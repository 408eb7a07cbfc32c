"""GPUs, their driver, and the wires between nodes. Nothing of this has been run on a machine with GPUs yet."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megacore.doctor.finding import FAIL, OK, WARN, Finding

HOT = 85
"""Degrees Celsius above which data-centre GPUs begin to lower their clocks."""
BAD_THROTTLE = (("hardware slowdown", 0x8), ("hot", 0x20), ("hardware hot", 0x40), ("power brake", 0x80))
"""NVML's reasons for lowered clocks that are faults (nvmlClocksEventReasons)."""


def cuda() -> Iterator[Finding]:
    """What torch sees."""
    import torch

    if not torch.cuda.is_available():
        present = Path("/proc/driver/nvidia/version").exists()
        if present and torch.version.cuda is None:
            text = "a driver is here, but this torch is a CPU build"
            yield Finding("cuda", FAIL, text, "pip install --force-reinstall torch from pytorch.org's CUDA index")
        elif present:
            yield Finding("cuda", FAIL, "a driver is here, but torch finds no device", "look at nvidia-smi")
        else:
            yield Finding("cuda", OK, "no GPU: training runs on the CPU, with gloo")
        return
    names: dict[str, int] = {}
    for number in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(number)
        names[name] = names.get(name, 0) + 1
    devices = ", ".join(f"{number} x {name}" for name, number in names.items())
    mixed = len(names) > 1
    yield Finding("cuda", WARN if mixed else OK, devices, "use GPUs of one kind in a run" if mixed else "")
    if torch.distributed.is_nccl_available():
        yield Finding("nccl", OK, ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding("nccl", FAIL, "this torch has no NCCL: GPUs cannot talk", "install another build of torch")


def health() -> Iterator[Finding]:
    """What NVML says of each GPU."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        yield Finding("nvml", OK, "nvidia-ml-py is not installed", 'pip install "megacore[monitor]"')
        return
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        yield Finding("nvml", OK, f"no GPU to ask: {error}")
        return
    try:
        yield Finding("driver", OK, str(nvml.nvmlSystemGetDriverVersion()))
        for number in range(nvml.nvmlDeviceGetCount()):
            yield from of_gpu(nvml, number)
    finally:
        nvml.nvmlShutdown()


def of_gpu(nvml: Any, number: int) -> Iterator[Finding]:
    """One GPU: what else runs there, heat, clocks, memory errors."""
    name, handle = f"gpu {number}", nvml.nvmlDeviceGetHandleByIndex(number)
    before = 0
    if others := nvml.nvmlDeviceGetComputeRunningProcesses(handle):
        before += 1
        pids = ", ".join(str(each.pid) for each in others)
        yield Finding(name, WARN, f"other processes run on it: {pids}", "end them, or leave this GPU out")
    heat = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
    if heat >= HOT:
        before += 1
        yield Finding(name, WARN, f"{heat} °C while idle", "look at the node's cooling")
    reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    if slowed := [text for text, bit in BAD_THROTTLE if reasons & bit]:
        before += 1
        yield Finding(
            name, FAIL, f"its clocks are lowered: {', '.join(slowed)}", "drain the node and have it looked at"
        )
    try:
        kind = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
        errors = nvml.nvmlDeviceGetTotalEccErrors(handle, kind, nvml.NVML_VOLATILE_ECC)
    except nvml.NVMLError:
        errors = 0  # a kind of GPU without ECC
    if errors:
        before += 1
        yield Finding(
            name, FAIL, f"{errors} uncorrected memory errors since its start", "drain the node; reset the GPU"
        )
    if not before:
        yield Finding(name, OK, f"{heat} °C, clocks free, no uncorrected memory errors")


def infiniband(root: Path = Path("/sys/class/infiniband")) -> Iterator[Finding]:
    """State and speed of every port."""
    if not root.exists():
        yield Finding("infiniband", OK, "none: nodes would talk over Ethernet")
        return
    for port in sorted(root.glob("*/ports/*")):
        name = f"{port.parents[1].name} port {port.name}"
        state, rate = ((port / each).read_text().strip() for each in ("state", "rate"))
        up = "ACTIVE" in state
        fix = "" if up else "look at its cable and the subnet manager (ibstat), or leave it out (NCCL_IB_HCA=^...)"
        yield Finding("infiniband", OK if up else WARN, f"{name}: {state}, {rate}", fix)
