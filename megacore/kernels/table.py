"""Which implementation of each fused operation a run uses: chosen once, with the reason for each rejection.

The table lists, per operation, its backends in order of preference. ``resolve`` takes the first that accepts the
device and dtype, or the one the user names. Modules receive the result and call it; they never choose.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megacore.kernels import fused, linear, reference
from megacore.kernels.linear import LinearKernel

Function = Callable[..., Any]


@dataclass(frozen=True)
class Kernel:
    """One implementation of an operation. ``refuses`` gives the reason why it cannot serve, or ''."""

    operation: str
    backend: str
    function: Any
    refuses: Callable[[torch.device, torch.dtype], str] = lambda device, dtype: ""


@dataclass(frozen=True)
class Kernels:
    """The chosen implementations; signatures are those of ``reference``."""

    linear: LinearKernel
    rms_norm: Function
    layer_norm: Function
    rope: Function
    swiglu: Function
    geglu: Function
    gelu: Function
    gelu_erf: Function
    relu2: Function
    attention: Function
    attention_dropout: Function
    attention_softcap: Function


@dataclass(frozen=True)
class Choice:
    """What was chosen for an operation, and why not the others."""

    operation: str
    backend: str
    rejected: tuple[str, ...]


def _widened(attend: Function) -> Function:
    """Attention by way of float32: of fp16 it took 20 times as long on an AMD CPU."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
        return attend(q.float(), k.float(), v.float(), mask, *rest).to(q.dtype)

    return attention


TABLE: tuple[Kernel, ...] = (
    Kernel("linear", "onednn", linear.ONEDNN, linear.onednn_refuses),
    Kernel("linear", "float32", linear.WIDENED_FP16, linear.widened_refuses),
    Kernel("linear", "out_dtype", linear.FROM_16_BITS, linear.from_16_bits_refuses),
    Kernel("linear", "torch", linear.REFERENCE),
    Kernel("rms_norm", "fused", fused.rms_norm),
    Kernel("rms_norm", "reference", reference.rms_norm),
    Kernel("layer_norm", "torch", fused.layer_norm),
    Kernel("layer_norm", "reference", reference.layer_norm),
    Kernel("rope", "fused", fused.rope),
    Kernel("rope", "reference", reference.rope),
    Kernel("swiglu", "fused", fused.swiglu),
    Kernel("swiglu", "reference", reference.swiglu),
    Kernel("geglu", "reference", reference.geglu),
    Kernel("gelu", "reference", reference.gelu),
    Kernel("gelu_erf", "reference", reference.gelu_erf),
    Kernel("relu2", "reference", reference.relu2),
    Kernel("attention", "float32", _widened(fused.attention), linear.widened_refuses),
    Kernel("attention", "sdpa", fused.attention),
    Kernel("attention", "reference", reference.attention),
    Kernel("attention_dropout", "float32", _widened(reference.attention), linear.widened_refuses),
    Kernel("attention_dropout", "reference", reference.attention),
    Kernel("attention_softcap", "float32", _widened(reference.attention), linear.widened_refuses),
    Kernel("attention_softcap", "reference", reference.attention),
)


def resolve(
    device: torch.device, dtype: torch.dtype, wanted: Mapping[str, str] | None = None
) -> tuple[Kernels, tuple[Choice, ...]]:
    """The kernels of a run and the story of their choice.

    ``wanted`` maps operation to backend. Raises ValueError for an operation or backend that is not in the table, or
    that refuses this device and dtype.
    """
    wanted = dict(wanted or {})
    operations = tuple(dict.fromkeys(kernel.operation for kernel in TABLE))
    if unknown := set(wanted).difference(operations):
        raise ValueError(f"kernels: {sorted(unknown)} are not operations; there are {list(operations)}")
    chosen: dict[str, Any] = {}
    choices = []
    for operation in operations:
        candidates = [kernel for kernel in TABLE if kernel.operation == operation]
        kernel, choice = first_willing(candidates, device, dtype, wanted.get(operation, ""))
        chosen[operation] = kernel.function
        choices.append(choice)
    return Kernels(**chosen), tuple(choices)


def first_willing(
    candidates: Sequence[Kernel], device: torch.device, dtype: torch.dtype, wanted: str = ""
) -> tuple[Kernel, Choice]:
    """The first of an operation's backends that accepts the device and dtype, or the one named ``wanted`` if it does.

    Raises ValueError if there is none.
    """
    operation = candidates[0].operation
    rejected: list[str] = []
    for kernel in candidates:
        if wanted in ("", kernel.backend):
            if not (reason := kernel.refuses(device, dtype)):
                return kernel, Choice(operation, kernel.backend, tuple(rejected))
            rejected.append(f"{kernel.backend}: {reason}")
    why = "; ".join(rejected) or f"no backend {wanted!r}"
    raise ValueError(f"kernels: no {operation} for {dtype} on {device}: {why}")
