"""Adam (Kingma and Ba 2015, algorithm 1), weight decay being part of the gradient (L2), with the paper's defaults."""

from collections.abc import Sequence
from types import MappingProxyType

from torch import Tensor

from megacore.optim.adam_steps import AdamSteps

DEFAULTS = MappingProxyType({"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0})
STATE = MappingProxyType({"first": "moment", "second": "square"})


class Adam(AdamSteps):
    """g = gradient + decay * w enters both moments."""

    kinds = STATE
    coupled = True

    def step(
        self, weight: Tensor, grad: Tensor, moments: Sequence[Tensor], lr: float, weight_decay: float
    ) -> tuple[Tensor, ...]:
        return self.move(weight, grad.add(weight, alpha=weight_decay) if weight_decay else grad, moments, lr)
