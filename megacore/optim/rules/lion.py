"""Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2): every step has the same size.

    w = w - lr * (sign(beta1 * m + (1 - beta1) * g) + decay * w)
    m = beta2 * m + (1 - beta2) * g

Defaults of algorithm 2; the paper's section 5 advises a learning rate 3 to 10 times smaller than AdamW's and a weight
decay as many times larger, and beta1=0.95, beta2=0.98 for language models that are not stable otherwise.
"""

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from megacore.optim.elementwise import ElementWise

DEFAULTS = MappingProxyType({"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0})
STATE = MappingProxyType({"momentum": "moment"})


class Lion(ElementWise):
    """Keeps one moment."""

    kinds = STATE

    def step(
        self, weight: Tensor, grad: Tensor, moments: Sequence[Tensor], lr: float, weight_decay: float
    ) -> tuple[Tensor, ...]:
        (momentum,) = moments
        direction = torch.lerp(grad, momentum, self.settings["beta1"]).sign_()
        decayed = weight * (1 - lr * weight_decay) if weight_decay else weight
        return decayed.sub(direction, alpha=lr), torch.lerp(grad, momentum, self.settings["beta2"])
