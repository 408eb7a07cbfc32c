"""Whether transformer-engine can be used here. Its modules own their communication, so `parallel/` adapts them."""

from functools import cache
from importlib import import_module, metadata

import torch
from packaging.version import Version

from megacore.kernels.choice import Kernel, Later

OLDEST = "2.9"
"""The first with ``autocast(enabled=, recipe=, amax_reduction_group=)``."""
INSTALL = 'pip install --no-build-isolation "megacore[te]"'


@cache
def unavailable() -> str:
    """Why transformer-engine cannot be called, or ''. A GPU is asked for first: without one its import fails in ways
    that say nothing of that."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        version = metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return f"it is not installed; {INSTALL}"
    if Version(version) < Version(OLDEST):
        return f"{version} is installed, {OLDEST} or later is needed; {INSTALL}"
    try:
        import_module("transformer_engine.pytorch")
    except Exception as reason:  # RuntimeError without its core, OSError without cuDNN, AssertionError, ...
        return f"it does not load: {reason}; {INSTALL}"
    return ""


def refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why its modules cannot serve, or ''."""
    if reason := unavailable():
        return reason
    if device.type != "cuda":
        return f"made for CUDA, not {device.type}"
    if dtype == torch.float64:
        return "used for 16 and 32 bits, not torch.float64"
    return ""


LINEAR = Later("transformer_engine.pytorch", "Linear")
MODULES = Kernel("linear", "transformer-engine", LINEAR, refuses, by_default=False)
"""The module that takes the place of the blocks' linear layers; not one of the products that ``table`` chooses from."""
