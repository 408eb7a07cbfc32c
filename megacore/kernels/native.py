"""The C++ operations of csrc/cpu, ``torch.ops.megacore_cpu``: loaded once, or the reason why they are not there."""

from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch.utils.flop_counter import register_flop_formula

INTERFACE = 6
"""As in csrc/cpu/ops.cpp: raised with every change of what is called, so that a library of other sources is refused."""

BUILD = "pip install --no-build-isolation -e . builds it"


@cache
def unavailable() -> str:
    """Why the operations cannot be called, or ''."""
    files = [Path(__file__).with_name(f"_cpu{suffix}") for suffix in EXTENSION_SUFFIXES]
    built = [file for file in files if file.exists()]
    if not built:
        return f"csrc/cpu is not built; with a C++20 compiler (apt install g++), {BUILD}"
    try:
        torch.ops.load_library(built[0])
    except OSError as reason:
        return f"{built[0].name} does not load: {reason}; {BUILD}"
    operations = torch.ops.megacore_cpu
    if not hasattr(operations, "interface") or operations.interface() != INTERFACE:
        return f"{built[0].name} was built from other sources; {BUILD}"
    for name in ("adamw_", "rms_norm_", "rms_norm_backward_", "swiglu_", "logit_statistics_", "attention_", "wgrad_"):
        # They only write into their arguments: there is nothing to say of results' shapes.
        torch.library.register_fake(f"megacore_cpu::{name}", lambda *arguments: None)
    register_flop_formula(operations.wgrad_)(_flops_of_wgrad)
    register_flop_formula(operations.attention_)(_flops_of_attention)
    return ""


def _flops_of_wgrad(into: torch.Size, x: torch.Size, grad: torch.Size, **_: object) -> int:
    """What torch counts of [o, i] += [t, o]^T [t, i], given their shapes."""
    return 2 * into.numel() * x[0]


def _flops_of_attention(q: torch.Size, k: torch.Size, v: torch.Size, *more: object, **_: object) -> int:
    """The same of q [b, s, n, d], with or without a gradient behind y, sums and scale: of scores that are hidden, too,
    and without those that a backward makes again, as torch counts its own attention."""
    product = 2 * q.numel() * k[1]
    return (5 if more[3] is not None else 2) * product


def instruction_sets() -> tuple[str, ...]:
    """What of csrc/cpu this processor can run, best first: avx512, avx2, portable."""
    return tuple(torch.ops.megacore_cpu.isas().split())
