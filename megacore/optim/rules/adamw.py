"""Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2).

Defaults of GPT-3's training (Brown et al. 2020, appendix B), which most language models have followed.
"""

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from megacore.kernels.table import Choice
from megacore.optim.adam_steps import AdamSteps, OnePass, one_pass

DEFAULTS = MappingProxyType({"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1})
STATE = MappingProxyType({"first": "moment", "second": "square"})


class AdamW(AdamSteps):
    """w shrinks by lr * decay beside the step, whatever its gradient's size."""

    kinds = STATE

    def choose(self, moments: torch.dtype) -> tuple[OnePass | None, Choice]:
        """Ours on the CPU, else torch's."""
        return one_pass(self.share.device, self.share.dtype, moments)

    def step(
        self, weight: Tensor, grad: Tensor, moments: Sequence[Tensor], lr: float, weight_decay: float
    ) -> tuple[Tensor, ...]:
        return self.move(weight * (1 - lr * weight_decay) if weight_decay else weight, grad, moments, lr)
