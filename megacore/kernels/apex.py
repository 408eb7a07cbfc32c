"""NVIDIA's apex, where it is installed: adapters to the signatures of ``reference`` and ``adamw``.

The package of that name on the index is another one; NVIDIA's is known by its module ``amp_C``. Never run: contract
tests hold the adapters against the signatures of an installed apex.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megacore.kernels.adamw import Moments, Rates

BUILD = (
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation git+https://github.com/NVIDIA/apex builds it"
)
NEEDED = ("amp_C", "fused_layer_norm_cuda")


@cache
def unavailable() -> str:
    """Why apex cannot be called, or ''."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if len(missing) == len(NEEDED):
        other = "the apex that is installed is not NVIDIA's (no amp_C)" if find_spec("apex") else "it is not installed"
        return f"{other}; {BUILD}"
    if missing:
        return f"it was built without {missing[0]}; {BUILD}"
    try:
        for name in (*NEEDED, "apex.normalization.fused_layer_norm", "apex.multi_tensor_apply"):
            import_module(name)
    except Exception as reason:  # extensions built for another torch or CUDA fail in many ways
        return f"it does not load: {reason}; {BUILD}"
    return ""


def refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why apex cannot serve, or ''."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if device.type != "cuda":
        return f"made for CUDA, not {device.type}"
    if dtype == torch.float64:
        return "used for 16 and 32 bits, not torch.float64"
    return unavailable()


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """As ``reference.rms_norm``."""
    function = import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine
    return function(x, weight + offset if offset else weight, tuple(weight.shape), eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As ``reference.layer_norm``."""
    function = import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    return function(x, weight, bias, tuple(weight.shape), eps)


@torch.no_grad()
def adamw(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: "Moments",
    rates: "Rates",
    taken: Tensor,
    copies: Sequence[Tensor] = (),
) -> None:
    """As ``adamw.AdamW``: a launch for every learning rate and weight decay. Step number and whether it is taken stay
    on the device. The kernel writes gradients back as it read them."""
    kernel: Any = import_module("amp_C").multi_tensor_adam_capturable
    apply: Any = import_module("apex.multi_tensor_apply").multi_tensor_applier
    skip, step = (1 - taken).to(torch.int32).reshape(1), moments.clock.to(torch.int32).reshape(1)
    kinds = list(zip(rates.lr, rates.weight_decay, strict=True))
    for lr, decay in dict.fromkeys(kinds):
        own = [place for place, kind in enumerate(kinds) if kind == (lr, decay)]
        lists = [
            [grads[place].to(torch.float32) for place in own],
            [weights[place] for place in own],
            [moments.first[place] for place in own],
            [moments.second[place] for place in own],
        ]
        rate = torch.full((1,), lr, dtype=torch.float32, device=taken.device)
        adam_w, corrects = int(not rates.coupled), 1
        own_rates = (rate, rates.beta1, rates.beta2, rates.eps, step, adam_w, corrects, decay, torch.ones_like(rate))
        apply(kernel, skip, lists, *own_rates)
    if copies:
        torch._foreach_copy_(list(copies), list(weights))
