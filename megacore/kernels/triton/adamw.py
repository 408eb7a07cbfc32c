"""A step of Adam or AdamW over flat buffers, one pass over memory (formulas: ``kernels.adamw``).

Step, its correction of bias and whether it is taken stay on the device: nothing waits for the host.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megacore.kernels.adamw import Moments, Rates
from megacore.kernels.triton.launch import NAMESPACE, wide

BLOCK = 1024


@triton.jit
def _step(
    weights, grads, firsts, seconds, copies, scalars, numel,
    COUPLED: tl.constexpr, COPIES: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scalars: keep (or decay), step size, unbias, eps, beta1, beta2, 1 - beta1, 1 - beta2, taken."""
    if tl.load(scalars + 8) != 0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < numel
        weight = tl.load(weights + place, mask=inside, other=0).to(WIDE)
        grad = tl.load(grads + place, mask=inside, other=0).to(WIDE)
        first = tl.load(firsts + place, mask=inside, other=0).to(WIDE)
        second = tl.load(seconds + place, mask=inside, other=0).to(WIDE)
        keep = tl.load(scalars)
        if COUPLED:
            grad += keep * weight
        else:
            weight *= keep
        first = tl.load(scalars + 4) * first + tl.load(scalars + 6) * grad
        second = tl.load(scalars + 5) * second + tl.load(scalars + 7) * grad * grad
        size = tl.sqrt(second) * tl.load(scalars + 2) + tl.load(scalars + 3)
        weight -= tl.load(scalars + 1) * first / size
        tl.store(firsts + place, first.to(firsts.dtype.element_ty), mask=inside)
        tl.store(seconds + place, second.to(seconds.dtype.element_ty), mask=inside)
        tl.store(weights + place, weight, mask=inside)
        if COPIES:
            tl.store(copies + place, weight.to(copies.dtype.element_ty), mask=inside)


@torch.library.custom_op(f"{NAMESPACE}::adamw_", mutates_args=("weight", "first", "second", "copy"))
def _adamw(
    weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, copy: Tensor | None, scalars: Tensor, coupled: bool
) -> None:
    if weight.numel():
        _step[(triton.cdiv(weight.numel(), BLOCK),)](
            weight, grad, first, second, weight if copy is None else copy, scalars, weight.numel(),
            COUPLED=coupled, COPIES=copy is not None, WIDE=wide(weight.dtype), BLOCK=BLOCK,
        )  # fmt: skip


@torch.no_grad()
def adamw(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Moments,
    rates: Rates,
    taken: Tensor,
    copies: Sequence[Tensor] = (),
) -> None:
    """As ``kernels.adamw.AdamW``."""
    if not weights:
        return
    clock = moments.clock.double()
    rest = torch.tensor(
        [rates.eps, rates.beta1, rates.beta2, 1 - rates.beta1, 1 - rates.beta2],
        dtype=torch.float64,
        device=clock.device,
    )
    correction, unbias = 1 / (1 - rates.beta1**clock), (1 - rates.beta2**clock).rsqrt()
    known: dict[tuple[float, float], Tensor] = {}
    for place, (weight, lr, decay) in enumerate(zip(weights, rates.lr, rates.weight_decay, strict=True)):
        if (lr, decay) not in known:
            keep = torch.full_like(clock, decay if rates.coupled else 1 - lr * decay)
            own = torch.stack((keep, lr * correction, unbias))
            known[lr, decay] = torch.cat((own, rest, taken.double().reshape(1))).to(weight.dtype)
        copy = copies[place] if copies else None
        _adamw(weight, grads[place], moments.first[place], moments.second[place], copy, known[lr, decay], rates.coupled)
