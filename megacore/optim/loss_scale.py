"""Loss scaling: fp16 has no gradients below 6e-8, so the loss is multiplied by a power of two and they by its inverse.

Micikevicius et al. 2018 ("Mixed precision training", section 3.2) show the need and name constant scales; the scale
that looks for itself starts high, is halved after an overflow and doubled after 2,000 steps without one, the constants
of NVIDIA's apex and of torch's GradScaler.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megacore.config.schema import PrecisionConfig

GROWTH, BACKOFF = 2.0, 0.5
LARGEST = 2.0**24
"""As apex: gradients that are all zero would otherwise double the scale to infinity."""


class LossScale:
    """What the loss is multiplied by: ``scale``, a float32 scalar on the device, which the host never reads.

    The loss's gradient is taken of loss * scale, and gradients are divided by it before their norm means anything.
    """

    def __init__(self, precision: PrecisionConfig, device: torch.device) -> None:
        self.dynamic = precision.loss_scale == "dynamic"
        self.every, self.least = precision.loss_scale_every, precision.loss_scale_min
        start = precision.loss_scale_start
        if not self.dynamic:
            start = 1.0 if precision.loss_scale == "off" else float(precision.loss_scale)
        self.scale = torch.full((), start, dtype=torch.float32, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """After a step; ``found_inf`` (scalar on the device) is 1 where it was skipped since a gradient overflowed.

        It must come from the global norm: that is one number on all ranks, so an overflow on any of them skips the
        step on all, and their scales stay equal without another word between them.
        """
        if not self.dynamic:
            return
        bad = found_inf != 0
        good_steps = (self.good_steps + 1).masked_fill(bad, 0)
        grows = good_steps >= self.every
        larger = (self.scale * GROWTH).clamp(max=max(LARGEST, self.least))
        smaller = (self.scale * BACKOFF).clamp(min=self.least)
        self.scale.copy_(torch.where(bad, smaller, torch.where(grows, larger, self.scale)))
        self.good_steps.copy_(good_steps.masked_fill(grows, 0))

    def state(self) -> Mapping[str, Tensor]:
        """What a checkpoint must hold, and a resumed run writes back into these very tensors."""
        return {"scale": self.scale, "good_steps": self.good_steps} if self.dynamic else {}
