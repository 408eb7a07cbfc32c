"""One step of AdamW or Adam (Loshchilov and Hutter 2019, algorithm 2): our C++ on the CPU, torch's
fused kernel, plain PyTorch.

With g a gradient, m and v its moments, w a weight and t the number of the step:

    m = beta1 m + (1 - beta1) g,    v = beta2 v + (1 - beta2) g^2
    w = (1 - lr decay) w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

Adam (Kingma and Ba 2015, algorithm 1) instead adds decay * w to g, and w does not shrink of itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from megacore.kernels import apex, native
from megacore.kernels.choice import Choice, Kernel, Later, first_willing
from megacore.kernels.cuda import library as cuda
from megacore.kernels.triton import available as triton

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Moments:
    """What AdamW remembers: per run of weights the means of gradients and of their squares, and the steps taken."""

    first: Tensors
    second: Tensors
    clock: Tensor
    """float32 scalar, already counting the step that is made."""


@dataclass(frozen=True)
class Rates:
    """The hyper-parameters of a step; learning rate and weight decay are of each run its own."""

    lr: Sequence[float]
    weight_decay: Sequence[float]
    beta1: float
    beta2: float
    eps: float
    coupled: bool = False
    """Adam: the decay is added to the gradient (L2) instead of taken from the weight."""


class AdamW(Protocol):
    """A step of all runs, in place. Where ``taken`` (float32 scalar on the device) is 0, nothing changes.

    ``weights``, ``grads`` and the moments are 1-D and contiguous; ``copies``, if not empty, receive the new weights
    rounded to bfloat16. Arithmetic is in the dtype of the weights, whatever the dtype of gradients and moments.
    """

    def __call__(
        self, weights: Tensors, grads: Tensors, moments: Moments, rates: Rates, taken: Tensor, copies: Tensors = ()
    ) -> None: ...


@torch.no_grad()
def compiled(
    weights: Tensors,
    grads: Tensors,
    moments: Moments,
    rates: Rates,
    taken: Tensor,
    copies: Tensors = (),
    isa: str = "",
) -> None:
    """As ``AdamW``, by csrc/cpu: one pass over memory. ``isa`` is the best of ``native.instruction_sets`` if empty.

    All instruction sets and numbers of threads give the same bits. Only where ``native.unavailable`` says ''.
    """
    torch.ops.megacore_cpu.adamw_(
        list(weights),
        list(grads),
        list(moments.first),
        list(moments.second),
        list(copies),
        moments.clock,
        taken,
        list(rates.lr),
        list(rates.weight_decay),
        rates.coupled,
        rates.beta1,
        rates.beta2,
        rates.eps,
        isa,
    )


@torch.no_grad()
def fused(
    weights: Tensors, grads: Tensors, moments: Moments, rates: Rates, taken: Tensor, copies: Tensors = ()
) -> None:
    """As ``AdamW``, by torch: a call for every learning rate and weight decay that there is."""
    step = torch._fused_adam_ if rates.coupled else torch._fused_adamw_
    kinds = list(zip(rates.lr, rates.weight_decay, strict=True))
    for kind in dict.fromkeys(kinds):
        own = [place for place, other in enumerate(kinds) if other == kind]
        step(
            [weights[place] for place in own],
            [grads[place].to(weights[place].dtype) for place in own],
            [moments.first[place] for place in own],
            [moments.second[place] for place in own],
            [],
            [moments.clock] * len(own),
            lr=kind[0],
            weight_decay=kind[1],
            beta1=rates.beta1,
            beta2=rates.beta2,
            eps=rates.eps,
            amsgrad=False,
            maximize=False,
            found_inf=1 - taken,
        )
    if copies:
        torch._foreach_copy_(list(copies), list(weights))


@torch.no_grad()
def reference(
    weights: Tensors, grads: Tensors, moments: Moments, rates: Rates, taken: Tensor, copies: Tensors = ()
) -> None:
    """As ``AdamW``, operation by operation."""
    is_taken = taken != 0
    runs = zip(weights, grads, moments.first, moments.second, rates.lr, rates.weight_decay, strict=True)
    for weight, narrow_grad, first, second, lr, decay in runs:
        clock, grad, keep = moments.clock.double(), narrow_grad.to(weight.dtype), 1 - lr * decay
        if rates.coupled:
            grad, keep = grad + decay * weight, 1.0
        mean = rates.beta1 * first.to(weight.dtype) + (1 - rates.beta1) * grad
        square = rates.beta2 * second.to(weight.dtype) + (1 - rates.beta2) * grad * grad
        step = (lr / (1 - rates.beta1**clock)).to(weight.dtype)
        unbias = (1 - rates.beta2**clock).rsqrt().to(weight.dtype)
        new = keep * weight - step * mean / (square.sqrt() * unbias + rates.eps)
        for old, updated in ((first, mean), (second, square), (weight, new)):
            old.copy_(torch.where(is_taken, updated.to(old.dtype), old))
    for copy, weight in zip(copies, weights):
        copy.copy_(torch.where(is_taken, weight.to(copy.dtype), copy))


def _same(moments: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    return dtype if moments is None else moments


def _native_refuses(device: torch.device, dtype: torch.dtype, moments: torch.dtype | None = None) -> str:
    if device.type != "cpu":
        return f"it is for the CPU, not {device.type}"
    if dtype != torch.float32:
        return f"it updates float32 weights, not {dtype}"
    if _same(moments, dtype) not in (torch.float32, torch.bfloat16):
        return f"its moments are float32 or bfloat16, not {moments}"
    return native.unavailable()


def _torch_refuses(device: torch.device, dtype: torch.dtype, moments: torch.dtype | None = None) -> str:
    if _same(moments, dtype) == dtype:
        return ""
    return f"its moments are in the dtype of the weights, {dtype}, not {moments}"


def _apex_refuses(device: torch.device, dtype: torch.dtype, moments: torch.dtype | None = None) -> str:
    if dtype != torch.float32 or _same(moments, dtype) != dtype:
        return f"used for float32 weights and moments, not {dtype} and {_same(moments, dtype)}"
    return apex.refuses(device, dtype)


def _cuda_refuses(device: torch.device, dtype: torch.dtype, moments: torch.dtype | None = None) -> str:
    if dtype != torch.float32:
        return f"it updates float32 weights, not {dtype}"
    if _same(moments, dtype) not in (torch.float32, torch.bfloat16):
        return f"its moments are float32 or bfloat16, not {moments}"
    return cuda.refuses(device, dtype)


def _triton_refuses(device: torch.device, dtype: torch.dtype, moments: torch.dtype | None = None) -> str:
    if dtype not in (torch.float32, torch.float64):
        return f"it updates float32 and float64 weights, not {dtype}"
    return triton.refuses(device, _same(moments, dtype))


BACKENDS = (
    Kernel("adamw", "native", compiled, _native_refuses),
    Kernel("adamw", "torch", fused, _torch_refuses),
    Kernel("adamw", "apex", apex.adamw, _apex_refuses, by_default=False),
    Kernel("adamw", "cuda", Later("megacore.kernels.cuda.operations", "adamw"), _cuda_refuses, by_default=False),
    Kernel("adamw", "triton", Later("megacore.kernels.triton.adamw", "adamw"), _triton_refuses, by_default=False),
    Kernel("adamw", "reference", reference),
)


def choose(device: torch.device, dtype: torch.dtype, moments: torch.dtype, wanted: str = "") -> tuple[AdamW, Choice]:
    """The fastest that can do it, with the story of its choice; or the backend ``wanted``.

    ``dtype`` is that of the weights, ``moments`` that of both moments. Measured: `megacore bench optim`.
    Raises ValueError for a backend that there is not, or that refuses.
    """
    backends = [replace(each, refuses=partial(each.refuses, moments=moments)) for each in BACKENDS[:-1]]
    kernel, choice = first_willing((*backends, BACKENDS[-1]), device, dtype, wanted)
    if kernel.backend == "native":
        choice = replace(choice, backend=f"native ({native.instruction_sets()[0]})")
    return kernel.loaded, choice
