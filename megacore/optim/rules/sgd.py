"""Gradient descent, with heavy-ball or Nesterov momentum, and decoupled weight decay.

    v = momentum * v + g
    w = (1 - lr * decay) * w - lr * v              heavy ball (Polyak 1964)
    w = (1 - lr * decay) * w - lr * (g + momentum * v)    Nesterov, as Sutskever et al. 2013 write it for networks

Plain descent by default: it is what equivalence of layouts is measured with. 0.9 is the usual momentum.
"""

from collections.abc import Sequence
from types import MappingProxyType

from torch import Tensor

from megacore.optim.elementwise import ElementWise

DEFAULTS = MappingProxyType({"momentum": 0.0, "nesterov": 0.0, "weight_decay": 0.0})
STATE = MappingProxyType({"velocity": "moment if momentum"})


class SGD(ElementWise):
    """Keeps a velocity where there is momentum."""

    kinds = STATE

    def step(
        self, weight: Tensor, grad: Tensor, moments: Sequence[Tensor], lr: float, weight_decay: float
    ) -> tuple[Tensor, ...]:
        decayed = weight * (1 - lr * weight_decay) if weight_decay else weight
        if not moments:
            return (decayed.sub(grad, alpha=lr),)
        momentum = self.settings["momentum"]
        velocity = grad.add(moments[0], alpha=momentum)
        change = grad.add(velocity, alpha=momentum) if self.settings["nesterov"] else velocity
        return decayed.sub(change, alpha=lr), velocity
