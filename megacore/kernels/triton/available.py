"""Whether Triton's kernels can be called here. Imports triton only when asked."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@cache
def unavailable() -> str:
    """Why triton cannot be imported, or ''."""
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton (Linux)"
    try:
        import_module("triton")
    except Exception as reason:  # a broken driver or compiler may raise anything
        return f"triton cannot be imported: {reason}"
    return ""


@cache
def interpreted() -> bool:
    """Whether triton came up as an interpreter (TRITON_INTERPRET=1 before its import), which takes CPU tensors."""
    return not unavailable() and bool(import_module("triton").knobs.runtime.interpret)


def refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why our Triton kernels cannot serve, or ''."""
    if reason := unavailable():
        return reason
    if dtype not in FLOATS:
        return f"made for floating point of 16 to 64 bits, not {dtype}"
    if interpreted():
        return "" if device.type == "cpu" else f"triton is in interpreter mode, which is for the CPU, not {device.type}"
    if device.type == "cuda":
        return ""
    if not torch.cuda.is_available():
        return "no CUDA device (on CPUs there is only triton's interpreter, for tests: TRITON_INTERPRET=1)"
    return f"made for CUDA, not {device.type}"
