"""Gradient descent with heavy-ball momentum (Polyak 1964) and decoupled weight decay."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megacore.config.schema import OptimConfig
from megacore.config.settings import settings
from megacore.optim.groups import decay_groups
from megacore.sharding.flat import FlatParameters
from megacore.spec import ParamSpec


class SGD:
    """velocity = momentum * velocity + gradient; weights = (1 - lr * decay) * weights - lr * velocity."""

    def __init__(self, flat: FlatParameters, specs: Mapping[str, ParamSpec], optim: OptimConfig) -> None:
        own = settings(optim)
        self.momentum, self.flat = own["momentum"], flat
        self.velocity = torch.zeros_like(flat.params.data) if self.momentum else None
        groups = decay_groups(flat, specs, own["weight_decay"])
        self.decayed = [(group.weight_decay, group.of(flat.params)) for group in groups if group.weight_decay]

    @torch.no_grad()
    def step(self, lr: float, skip: Tensor) -> None:
        """As ``Optimizer.step``."""
        taken = skip == 0
        # where() and not a product: an infinite gradient times 0 would be nan
        change = torch.where(taken, self.flat.grads.data, 0.0)
        if self.velocity is not None:
            self.velocity.mul_(self._factor(self.momentum, taken)).add_(change)
            change = torch.where(taken, self.velocity, 0.0)
        for weight_decay, params in self.decayed:
            torch._foreach_mul_(params, self._factor(1 - lr * weight_decay, taken))
        self.flat.params.data.sub_(change, alpha=lr)

    def _factor(self, value: float, taken: Tensor) -> Tensor:
        """``value``, or 1 on a skipped step: a scalar of the weights' dtype (a bare number would become float32)."""
        data = self.flat.params.data
        return torch.full((), value, dtype=data.dtype, device=data.device).masked_fill_(~taken, 1.0)
