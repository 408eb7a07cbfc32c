"""Which implementation of each fused operation a run uses: chosen once, with the reason for each rejection.

The table lists, per operation, its backends in order of preference: as fast as they were measured, and where that says
nothing transformer-engine, apex, ours, torch. ``resolve`` takes the first that accepts the device and dtype, or the one
the user names (`kernels.use`). What nobody has measured where it runs is taken only by name. Modules receive the result
and call it; they never choose. ``operations`` says what each operation means and on what it is tested and timed.

Rows begin with two literals, which the config reads without importing this file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from megacore.kernels import adamw, apex, compiled, experts, fused, linear, native, reference, transformer_engine
from megacore.kernels.choice import Choice as Choice
from megacore.kernels.choice import Kernel as Kernel
from megacore.kernels.choice import Later, reason_against
from megacore.kernels.choice import first_willing as first_willing
from megacore.kernels.cuda import library as cuda
from megacore.kernels.linear import LinearKernel
from megacore.kernels.triton import available as triton

Function = Callable[..., Any]


@dataclass(frozen=True)
class Kernels:
    """The chosen implementations of what models call; signatures are those of ``reference``."""

    linear: LinearKernel
    rms_norm: Function
    layer_norm: Function
    rms_norm_add: Function
    layer_norm_add: Function
    rope: Function
    swiglu: Function
    geglu: Function
    gelu: Function
    gelu_erf: Function
    relu2: Function
    bias_gelu: Function
    attention: Function
    attention_dropout: Function
    attention_softcap: Function
    logit_statistics: Function
    squares: Function
    quantise: Function


def _widened(attend: Function) -> Function:
    """Attention by way of float32: of fp16 it took 20 times as long on an AMD CPU."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
        return attend(q.float(), k.float(), v.float(), mask, *rest).to(q.dtype)

    return attention


def _ours(module: str, name: str) -> Later:
    return Later(f"megacore.kernels.triton.{module}", name)


def _cuda(name: str) -> Later:
    return Later("megacore.kernels.cuda.operations", name)


TABLE: tuple[Kernel, ...] = (
    Kernel("linear", "native", linear.NATIVE, linear.native_refuses),
    Kernel("linear", "onednn", linear.ONEDNN, linear.onednn_refuses),
    Kernel("linear", "float32", linear.WIDENED_FP16, linear.widened_refuses),
    Kernel("linear", "out_dtype", linear.FROM_16_BITS, linear.from_16_bits_refuses),
    Kernel("linear", "torch", linear.REFERENCE),
    Kernel("rms_norm", "native", compiled.rms_norm, compiled.refuses),
    Kernel("rms_norm", "fused", fused.rms_norm),
    Kernel("rms_norm", "apex", apex.rms_norm, apex.refuses, by_default=False),
    Kernel("rms_norm", "cuda", _cuda("rms_norm"), cuda.refuses, by_default=False),
    Kernel("rms_norm", "triton", _ours("norms", "rms_norm"), triton.refuses, by_default=False),
    Kernel("rms_norm", "reference", reference.rms_norm),
    Kernel("rms_norm_add", "native", compiled.rms_norm_add, compiled.refuses),
    Kernel("rms_norm_add", "fused", fused.rms_norm_add),
    Kernel("rms_norm_add", "cuda", _cuda("rms_norm_add"), cuda.refuses, by_default=False),
    Kernel("rms_norm_add", "triton", _ours("norms", "rms_norm_add"), triton.refuses, by_default=False),
    Kernel("rms_norm_add", "reference", reference.rms_norm_add),
    Kernel("layer_norm", "torch", fused.layer_norm),
    Kernel("layer_norm", "apex", apex.layer_norm, apex.refuses, by_default=False),
    Kernel("layer_norm", "cuda", _cuda("layer_norm"), cuda.refuses, by_default=False),
    Kernel("layer_norm", "triton", _ours("norms", "layer_norm"), triton.refuses, by_default=False),
    Kernel("layer_norm", "reference", reference.layer_norm),
    Kernel("layer_norm_add", "torch", fused.layer_norm_add),
    Kernel("layer_norm_add", "cuda", _cuda("layer_norm_add"), cuda.refuses, by_default=False),
    Kernel("layer_norm_add", "reference", reference.layer_norm_add),
    Kernel("rope", "fused", fused.rope),
    Kernel("rope", "cuda", _cuda("rope"), cuda.refuses, by_default=False),
    Kernel("rope", "triton", _ours("rope", "rope"), triton.refuses, by_default=False),
    Kernel("rope", "reference", reference.rope),
    Kernel("rope_interleaved", "cuda", _cuda("rope_interleaved"), cuda.refuses, by_default=False),
    Kernel("rope_interleaved", "triton", _ours("rope", "rope_interleaved"), triton.refuses, by_default=False),
    Kernel("rope_interleaved", "reference", reference.rope_interleaved),
    Kernel("swiglu", "native", compiled.swiglu, compiled.refuses),
    Kernel("swiglu", "fused", fused.swiglu),
    Kernel("swiglu", "cuda", _cuda("swiglu"), cuda.refuses, by_default=False),
    Kernel("swiglu", "triton", _ours("activations", "swiglu"), triton.refuses, by_default=False),
    Kernel("swiglu", "reference", reference.swiglu),
    Kernel("geglu", "cuda", _cuda("geglu"), cuda.refuses, by_default=False),
    Kernel("geglu", "triton", _ours("activations", "geglu"), triton.refuses, by_default=False),
    Kernel("geglu", "reference", reference.geglu),
    Kernel("gelu", "reference", reference.gelu),
    Kernel("gelu_erf", "reference", reference.gelu_erf),
    Kernel("relu2", "reference", reference.relu2),
    Kernel("bias_gelu", "fused", fused.bias_gelu),
    Kernel("bias_gelu", "cuda", _cuda("bias_gelu"), cuda.refuses, by_default=False),
    Kernel("bias_gelu", "triton", _ours("activations", "bias_gelu"), triton.refuses, by_default=False),
    Kernel("bias_gelu", "reference", reference.bias_gelu),
    Kernel("attention", "native", compiled.attention, compiled.attention_refuses),
    Kernel("attention", "float32", _widened(fused.attention), linear.widened_refuses),
    Kernel("attention", "sdpa", fused.attention),
    Kernel("attention", "reference", reference.attention),
    Kernel("attention_dropout", "float32", _widened(reference.attention), linear.widened_refuses),
    Kernel("attention_dropout", "reference", reference.attention),
    Kernel("attention_softcap", "float32", _widened(reference.attention), linear.widened_refuses),
    Kernel("attention_softcap", "reference", reference.attention),
    Kernel("softmax", "cuda", _cuda("softmax"), cuda.refuses, by_default=False),
    Kernel("softmax", "triton", _ours("softmax", "softmax"), triton.refuses, by_default=False),
    Kernel("softmax", "reference", reference.softmax),
    Kernel("logit_statistics", "native", compiled.logit_statistics, compiled.refuses),
    Kernel("logit_statistics", "cuda", _cuda("logit_statistics"), cuda.refuses, by_default=False),
    Kernel("logit_statistics", "triton", _ours("statistics", "logit_statistics"), triton.refuses, by_default=False),
    Kernel("logit_statistics", "reference", reference.logit_statistics),
    Kernel("squares", "foreach", fused.squares),
    Kernel("squares", "cuda", _cuda("squares"), cuda.refuses, by_default=False),
    Kernel("squares", "triton", _ours("squares", "squares"), triton.refuses, by_default=False),
    Kernel("squares", "reference", reference.squares),
    Kernel("quantise", "cuda", _cuda("quantise"), cuda.refuses, by_default=False),
    Kernel("quantise", "triton", _ours("quantise", "quantise"), triton.refuses, by_default=False),
    Kernel("quantise", "reference", reference.quantise),
    Kernel("bias_dropout_add", "fused", fused.bias_dropout_add),
    Kernel("bias_dropout_add", "reference", reference.bias_dropout_add),
    Kernel("permute", "gather", experts.permute),
    Kernel("permute", "reference", reference.permute),
    Kernel("unpermute", "gather", experts.unpermute),
    Kernel("unpermute", "reference", reference.unpermute),
    Kernel("grouped_product", "grouped_mm", experts.grouped_product, experts.grouped_refuses),
    Kernel("grouped_product", "reference", reference.grouped_product),
    *adamw.BACKENDS,
)


def resolve(
    device: torch.device, dtype: torch.dtype, wanted: Mapping[str, str] | None = None
) -> tuple[Kernels, tuple[Choice, ...]]:
    """The kernels of a run and the story of their choice.

    ``wanted`` maps operation to backend. Raises ValueError for an operation or backend that is not in the table, or
    that refuses this device and dtype.
    """
    wanted = dict(wanted or {})
    operations = tuple(field.name for field in fields(Kernels))
    if unknown := set(wanted).difference(operations):
        raise ValueError(f"kernels: {sorted(unknown)} are not operations; there are {list(operations)}")
    chosen: dict[str, Any] = {}
    choices = []
    for operation in operations:
        candidates = [kernel for kernel in TABLE if kernel.operation == operation]
        kernel, choice = first_willing(candidates, device, dtype, wanted.get(operation, ""))
        chosen[operation] = kernel.loaded
        choices.append(choice)
    return Kernels(**chosen), tuple(choices)


def explain(device: torch.device, dtype: torch.dtype, choices: Sequence[Choice]) -> list[str]:
    """A line for every choice: what was taken, and of each other backend why not. ``dtype`` is that of parameters."""
    lines = []
    for choice in choices:
        rows = (*TABLE, transformer_engine.MODULES)
        others = [kernel for kernel in rows if kernel.operation == choice.operation]
        taken = next((k for k in others if choice.backend in (k.backend, f"{k.backend} {_note(choice)}")), None)
        # an optimizer updates 16-bit parameters in float32
        numbers = torch.promote_types(dtype, torch.float32) if choice.operation == "adamw" else dtype
        told = list(choice.rejected)
        if not told and taken:
            told = [f"{kernel.backend}: kernels.use names another" for kernel in others[: others.index(taken)]]
        for kernel in others[others.index(taken) + 1 :] if taken else ():
            told.append(f"{kernel.backend}: {_reason(kernel, device, numbers) or f'{choice.backend} comes first'}")
        lines.append(f"{choice.operation} ({choice.backend}){''.join(f'; not {each}' for each in told)}")
    return lines


def packages() -> list[str]:
    """A line for everything that brings kernels and may be missing: that it was found, or why not."""
    reasons = {
        "transformer-engine": transformer_engine.unavailable(),
        "apex": apex.unavailable(),
        "triton": triton.unavailable(),
        "csrc/cpu": native.unavailable(),
        "csrc/cuda": cuda.unavailable(),
    }
    return [f"{name}: {reason or 'found'}" for name, reason in reasons.items()]


def _note(choice: Choice) -> str:
    """What a backend says of itself behind its name: "(avx512)"."""
    return choice.backend[choice.backend.find("(") :]


def _reason(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str:
    return reason_against(kernel, device, dtype, named=False)
