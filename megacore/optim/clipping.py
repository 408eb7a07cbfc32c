"""Large gradients are made smaller before they are used; gradients that are not finite are not used at all.

Everything is decided on the device from the norms of the whole model's parameters (``GlobalNorm``), which are equal on
all ranks: so the result does not depend on who holds what, and all ranks skip a step or none.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from megacore.config.schema import OptimConfig
from megacore.optim.norm import GlobalNorm

CLIP_EPS = 1e-6
"""Added to the global norm before dividing, as torch's clip_grad_norm_ does."""


@dataclass(frozen=True)
class Clipped:
    """What became of the gradients; scalars on the device, ``norm``, ``norms`` and ``taken`` equal on all ranks."""

    norm: Tensor
    """float64: the norm of the mean gradient before it was clipped."""
    norms: Tensor
    """float64 [num_params]: the same of every parameter of the model, in global order."""
    taken: Tensor
    """float32: 1, or 0 where the norm is not finite; then all gradients were set to 0."""
    changed: Tensor | None
    """bool: clipping made some of this rank's gradients smaller; None unless watched."""


class Clip(ABC):
    """Turns summed gradients into mean ones that are bounded; ``watched``: it is to say whether it had to."""

    def __init__(self, optim: OptimConfig, norm: GlobalNorm, watched: bool = False) -> None:
        self.optim, self.norm, self.watched = optim, norm, watched

    @torch.no_grad()
    def __call__(self, grads: Sequence[Tensor], to_mean: Tensor) -> Clipped:
        """Scale ``grads`` (one 1-D tensor per run) by ``to_mean`` (float64 scalar on the device) and clip, in place.

        ``to_mean`` undoes a loss scale, too.
        """
        grads = list(grads)
        squares = self.norm.squares(grads)
        norm, norms = squares.sum().sqrt() * to_mean, squares.sqrt() * to_mean
        taken = torch.isfinite(norm)
        changed = self.bound(grads, to_mean, norm, norms, taken)
        clear_unless(taken, grads)
        return Clipped(norm, norms, taken.to(torch.float32), changed & taken if changed is not None else None)

    @abstractmethod
    def bound(self, grads: list[Tensor], to_mean: Tensor, norm: Tensor, norms: Tensor, taken: Tensor) -> Tensor | None:
        """Scale and clip; says whether anything was made smaller (bool scalar), if that is watched.

        Where ``taken`` is false, gradients may become anything, but nothing may be remembered.
        """

    def state(self) -> Mapping[str, Tensor]:
        """What a checkpoint must hold, and a resumed run writes back into these very tensors."""
        return {}


class Unclipped(Clip):
    """Means alone."""

    def bound(self, grads: list[Tensor], to_mean: Tensor, norm: Tensor, norms: Tensor, taken: Tensor) -> Tensor | None:
        scale_all(grads, to_mean)
        return torch.zeros_like(taken) if self.watched else None


class ByNorm(Clip):
    """All gradients times one factor, so that the global norm is ``clip_grad`` at most (Pascanu et al. 2013, section
    3.2)."""

    def bound(self, grads: list[Tensor], to_mean: Tensor, norm: Tensor, norms: Tensor, taken: Tensor) -> Tensor | None:
        scale_all(grads, to_mean * factor_of_norm(norm, self.optim.clip_grad))
        return norm + CLIP_EPS > self.optim.clip_grad if self.watched else None


class ByValue(Clip):
    """Each element of the mean gradient within ``clip_grad`` of zero."""

    def bound(self, grads: list[Tensor], to_mean: Tensor, norm: Tensor, norms: Tensor, taken: Tensor) -> Tensor | None:
        largest = self.optim.clip_grad
        scale_all(grads, to_mean)
        changed = None
        if self.watched:
            parts = torch._foreach_norm(grads, torch.inf) if grads else []
            changed = torch.stack([part > largest for part in parts]).any() if parts else torch.zeros_like(taken)
        for grad in grads:
            grad.clamp_(-largest, largest)
        return changed


class AdaGC(Clip):
    """Each parameter's norm within ``adagc_ratio`` of a moving average of what it was after clipping.

    Wang et al. 2025 ("AdaGC", arXiv 2502.11034, algorithm 1), whose constants are the defaults: ratio 1.05, decay 0.98,
    100 steps of clipping by the global norm, over which the average is the smallest norm seen. Unlike there, a norm of
    0 is not counted: after it no gradient would ever pass again. Until a parameter has had another one, it is clipped
    with all.
    """

    def __init__(self, optim: OptimConfig, norm: GlobalNorm, watched: bool = False) -> None:
        super().__init__(optim, norm, watched)
        device = norm.places.device
        # infinite: not seen yet
        self.usual = torch.full((norm.num_params,), torch.inf, dtype=torch.float64, device=device)
        self.clock = torch.zeros((), dtype=torch.int64, device=device)
        self.place_of_run = torch.tensor(norm.counted.place_of_run, dtype=torch.long, device=device)

    def bound(self, grads: list[Tensor], to_mean: Tensor, norm: Tensor, norms: Tensor, taken: Tensor) -> Tensor | None:
        o = self.optim
        warming_up, seen = self.clock < o.adagc_warmup_steps, torch.isfinite(self.usual)
        own = (o.adagc_ratio * self.usual / norms).clamp(max=1.0)
        factors = torch.where(seen & ~warming_up, own, factor_of_norm(norm, o.clip_grad))
        clipped = norms * factors
        average = torch.where(seen, o.adagc_beta * self.usual + (1 - o.adagc_beta) * clipped, clipped)
        usual = torch.where(warming_up, torch.minimum(self.usual, clipped), average)
        self.usual.copy_(torch.where(taken & (norms > 0), usual, self.usual))
        self.clock += taken
        scale_each(grads, (to_mean * factors)[self.place_of_run])
        return (factors < 1.0).any() if self.watched else None

    def state(self) -> Mapping[str, Tensor]:
        """One number per parameter in global order, and how many steps they stand for."""
        return {"usual_norms": self.usual, "clock": self.clock}


KINDS: Mapping[str, type[Clip]] = MappingProxyType(
    {"norm": ByNorm, "value": ByValue, "adagc": AdaGC, "none": Unclipped}
)


def make_clip(optim: OptimConfig, norm: GlobalNorm, watched: bool = False) -> Clip:
    """What ``optim.clip`` names; ``optim.clip_grad`` of 0 is none."""
    return KINDS[optim.clip if optim.clip_grad else "none"](optim, norm, watched)


def factor_of_norm(norm: Tensor, largest: float) -> Tensor:
    """What brings a norm down to ``largest``; 1 where it is smaller already."""
    return (largest / (norm + CLIP_EPS)).clamp(max=1.0)


def scale_all(grads: list[Tensor], factor: Tensor) -> None:
    """All gradients times one scalar on the device."""
    if grads:
        torch._foreach_mul_(grads, factor.to(factor_dtype(grads)))


def scale_each(grads: list[Tensor], factors: Tensor) -> None:
    """Each gradient times its own of ``factors`` [num_runs]."""
    if grads:
        torch._foreach_mul_(grads, list(factors.to(factor_dtype(grads)).unbind()))


def factor_dtype(grads: list[Tensor]) -> torch.dtype:
    """That of the gradients, or float32: in 16 bits a factor would be rounded, or vanish."""
    return torch.promote_types(grads[0].dtype, torch.float32)


def clear_unless(taken: Tensor, grads: list[Tensor]) -> None:
    """Zeros where ``taken`` (bool scalar) is false: no factor makes them of infinities.

    On CPU the answer is at hand, and saves a pass over memory; a device must not be waited for.
    """
    if taken.device.type == "cpu":
        if not taken:
            for grad in grads:
                grad.zero_()
    else:
        clear_where(~taken, grads)


def clear_where(skipped: Tensor, grads: list[Tensor]) -> None:
    """Zeros where ``skipped`` (bool scalar on the device), which the host never reads."""
    for grad in grads:
        grad.masked_fill_(skipped, 0.0)
