"""What lies between a block's matrix products, compiled by torch: `kernels.compile`.

A block is not compiled as one graph. Its products add weight gradients to buffers by hand, put them off, or wait for
other ranks, none of which a graph may do; what is between them is what compiling gains on, for there every operation
reads and writes memory. So the pieces are compiled: norms (with the residual's sum), activations, and everything that
happens to heads before attention, which has kernels of its own. They are functions of tensors alone, so all blocks
share a piece's graph. Each is a whole graph: what torch cannot compile, or would compile too often, is an error, never
quietly eager.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from megacore.kernels import reference
from megacore.kernels.choice import Choice
from megacore.kernels.table import Kernels

PIECES = (
    "rms_norm",
    "layer_norm",
    "rms_norm_add",
    "layer_norm_add",
    "rope",
    "swiglu",
    "geglu",
    "gelu",
    "gelu_erf",
    "relu2",
    "bias_gelu",
)
BACKEND = "compiled"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors as one graph, made when it is first called. Raises torch's error where that fails."""
    return torch.compile(function, fullgraph=True)


def compiled_kernels(
    kernels: Kernels, choices: Sequence[Choice], named: Collection[str]
) -> tuple[Kernels, tuple[Choice, ...]]:
    """The references of what is between products, compiled; all else, and what the user ``named``, stays."""
    taken = [field.name for field in fields(Kernels) if field.name in PIECES and field.name not in named]
    changed: dict[str, Any] = {name: compiled(getattr(reference, name)) for name in taken}
    told = [Choice(c.operation, BACKEND, ()) if c.operation in changed else c for c in choices]
    return replace(kernels, **changed), tuple(told)


def check_compiler(device: torch.device) -> None:
    """Raises ValueError where nothing can be compiled for a device."""
    if reason := _refuses(device):
        raise ValueError(f"kernels.compile=true: torch cannot compile for {device.type} here ({reason}); leave it out")


def _refuses(device: torch.device) -> str:
    try:
        if device.type == "cuda":
            import triton  # noqa: F401
        else:
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
    except Exception as error:  # whatever a broken installation raises
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""
