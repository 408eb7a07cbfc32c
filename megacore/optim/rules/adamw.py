"""Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2).

Defaults of GPT-3's training (Brown et al. 2020, appendix B), which most language models have followed.
"""

from collections.abc import Sequence
from types import MappingProxyType

from torch import Tensor

from megacore.optim.adam_steps import AdamSteps

DEFAULTS = MappingProxyType({"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1})
STATE = MappingProxyType({"first": "moment", "second": "square"})


class AdamW(AdamSteps):
    """w shrinks by lr * decay beside the step, whatever its gradient's size."""

    kinds = STATE
    coupled = False

    def step(
        self, weight: Tensor, grad: Tensor, moments: Sequence[Tensor], lr: float, weight_decay: float
    ) -> tuple[Tensor, ...]:
        return self.move(weight * (1 - lr * weight_decay) if weight_decay else weight, grad, moments, lr)
