"""What a step writes, if it is taken: where it is not, every bit stays, and the host never knows."""

import torch
from torch import Tensor

from megacore.optim.moments import Moment
from megacore.optim.rule import Share


def put(taken: Tensor, state: Tensor, value: Tensor) -> None:
    """``state`` becomes ``value``, of the same shape, where the boolean scalar ``taken`` says so.

    A choice and not a product with 0 or 1: a ``value`` that is not taken may be nan, and -0.0 + 0.0 is not -0.0.
    """
    torch.where(taken, value.to(state.dtype), state, out=state)


def descend(taken: Tensor, share: Share, run: int, step: Tensor, lr: float, weights: Moment | None = None) -> None:
    """weights = (1 - lr * decay) * weights - lr * step, for one run, in the precision of ``step``.

    The decay is decoupled from the gradient (Loshchilov and Hutter 2019) and ``lr`` is scaled as the run's is.
    ``weights`` are the share's, if they may be rounded by chance or lie in halves.
    """
    part, rate, decay = whole(step), lr * share.lr_scale[run], share.weight_decay[run]
    old = share.weights[run].to(step.dtype) if weights is None else weights.read(run, part, step.dtype)
    new = (old * (1 - rate * decay) if decay else old).sub(step, alpha=rate)
    if weights is None:
        put(taken, share.weights[run], new)
    else:
        weights.write(run, part, new, taken)


def whole(tensor: Tensor) -> slice:
    """All of a 1-D tensor."""
    return slice(0, tensor.numel())
