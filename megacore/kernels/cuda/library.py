"""The operations of csrc/cuda, ``torch.ops.megacore_cuda``: loaded once, or the reason why they are not there."""

from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

INTERFACE = 1
"""As in csrc/cuda/ops.cpp: raised with every change of what is called; a library of other sources is refused."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

BUILD = "MEGACORE_CUDA=1 pip install --no-build-isolation -e . builds it"


def loaded() -> bool:
    """Whether a library with these operations has been loaded."""
    return hasattr(torch.ops.megacore_cuda, "interface")


def load(file: Path) -> str:
    """Load this library. Returns why its operations cannot be called, or ''."""
    try:
        torch.ops.load_library(file)
    except OSError as reason:
        return f"{file.name} does not load: {reason}; {BUILD}"
    if not loaded() or torch.ops.megacore_cuda.interface() != INTERFACE:
        return f"{file.name} was built from other sources; {BUILD}"
    return ""


@cache
def unavailable() -> str:
    """Why the operations cannot be called, or ''."""
    if loaded():
        return ""
    built = [
        file for file in (Path(__file__).with_name(f"_cuda{suffix}") for suffix in EXTENSION_SUFFIXES) if file.exists()
    ]
    if not built:
        return f"csrc/cuda is not built; with nvcc (CUDA toolkit) and g++, {BUILD}"
    return load(built[0])


def emulated() -> bool:
    """Whether the library that is loaded is the tests' one, for CPU tensors."""
    return loaded() and bool(torch.ops.megacore_cuda.emulated())


def refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why our CUDA kernels cannot serve, or ''."""
    if reason := unavailable():
        return reason
    if dtype not in FLOATS:
        return f"made for float32, bfloat16 and float16, not {dtype}"
    if emulated():
        return "" if device.type == "cpu" else f"the emulated device is for the CPU, not {device.type}"
    if device.type == "cuda":
        return ""
    return f"made for CUDA, not {device.type}" if torch.cuda.is_available() else "no CUDA device"
