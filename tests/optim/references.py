"""Element-wise optimizers as their papers write them, on one whole tensor: what the real ones are held against.

Each takes the first weight, the gradients and learning rates of all steps, the weight decay and the hyper-parameters,
and gives the last weight.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

Reference = Callable[[Tensor, Sequence[Tensor], Sequence[float], float, Mapping[str, float]], Tensor]


def sgd(w: Tensor, grads: Sequence[Tensor], rates: Sequence[float], decay: float, own: Mapping[str, float]) -> Tensor:
    mu, v = own["momentum"], 0.0 * w
    for g, lr in zip(grads, rates):
        v = mu * v + g
        step = g + mu * v if own["nesterov"] else v
        w = w - lr * decay * w - lr * step
    return w


def lion(w: Tensor, grads: Sequence[Tensor], rates: Sequence[float], decay: float, own: Mapping[str, float]) -> Tensor:
    m = 0.0 * w
    for g, lr in zip(grads, rates):
        c = own["beta1"] * m + (1 - own["beta1"]) * g
        w = w - lr * (c.sign() + decay * w)
        m = own["beta2"] * m + (1 - own["beta2"]) * g
    return w


def adam(w: Tensor, grads: Sequence[Tensor], rates: Sequence[float], decay: float, own: Mapping[str, float]) -> Tensor:
    """Decay in the gradient."""
    return _adam(w, grads, rates, decay, 0.0, own)


def adamw(w: Tensor, grads: Sequence[Tensor], rates: Sequence[float], decay: float, own: Mapping[str, float]) -> Tensor:
    """Decay beside the step."""
    return _adam(w, grads, rates, 0.0, decay, own)


def _adam(
    w: Tensor,
    grads: Sequence[Tensor],
    rates: Sequence[float],
    coupled: float,
    decoupled: float,
    own: Mapping[str, float],
) -> Tensor:
    beta1, beta2 = own["beta1"], own["beta2"]
    m, v = 0.0 * w, 0.0 * w
    for t, (g, lr) in enumerate(zip(grads, rates), start=1):
        g = g + coupled * w
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        unbiased_m, unbiased_v = m / (1 - beta1**t), v / (1 - beta2**t)
        w = w - lr * (unbiased_m / (unbiased_v**0.5 + own["eps"]) + decoupled * w)
    return w


REFERENCES: dict[str, Reference] = {"adam": adam, "adamw": adamw, "lion": lion, "sgd": sgd}
