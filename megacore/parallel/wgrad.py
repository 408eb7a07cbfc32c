"""Where weight gradients go: the one place that adds to a parameter's gradient buffer by hand.

A backward can be split (Qi et al. 2023, section 2): gradients of inputs first, since other ranks wait for them, those
of weights when there is time. Everything that only adds to a weight's gradient can wait; it is kept with what it needs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from megacore.kernels.linear import LinearKernel

Work = Callable[[], object]


class WeightGradients:
    """Adds weight gradients at once or, inside ``put_off``, keeps the work for later.

    Where there is a place for it (a view of the flat gradient buffer), the product is added to it by the GEMM
    itself and None is returned, so nothing of the weight's size is allocated; otherwise the gradient is returned.
    """

    def __init__(self) -> None:
        self._kept: list[Work] | None = None

    @contextmanager
    def put_off(self) -> Iterator[list[Work]]:
        """Within, nothing is added; the list that is given holds what is to be called later, in order."""
        kept: list[Work] = []
        self._kept = kept
        try:
            yield kept
        finally:
            self._kept = None

    def linear(self, kernel: LinearKernel, weight: Tensor, x_ti: Tensor, grad_to: Tensor) -> Tensor | None:
        """Weight gradient of y = x w^T. x [t, in], grad [t, out] -> w's [out, in]."""
        if not weight.requires_grad:  # frozen
            return None
        into = gradient_of(weight)
        if into is None:
            made = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            kernel.wgrad(made, x_ti, grad_to)
            return made.to(weight.dtype)
        return self._add(partial(kernel.wgrad, into, x_ti, grad_to))

    def bias(self, bias: Tensor, grad_to: Tensor) -> Tensor | None:
        """Bias gradient: the sum over tokens. grad [t, out]."""
        into = gradient_of(bias)
        if into is None:
            return grad_to.sum(0)
        return self._add(partial(_add_sum, into, grad_to))

    def rows(self, weight: Tensor, index_t: Tensor, grad_th: Tensor) -> Tensor | None:
        """Gradient of a look-up: add row t of grad [t, h] to row ``index_t[t]``."""
        into = gradient_of(weight)
        if into is None:
            return weight.new_zeros(weight.shape).index_add_(0, index_t, grad_th)
        return self._add(partial(into.index_add_, 0, index_t, grad_th.to(into.dtype)))

    def due(self, work: Work) -> None:
        """Do work at once or, inside ``put_off``, keep it for later."""
        if self._kept is None:
            work()
        else:
            self._kept.append(work)

    def _add(self, work: Work) -> Tensor | None:
        """None: what autograd is to be told of the gradient."""
        self.due(work)
        return None


def gradient_of(param: Tensor) -> Tensor | None:
    """Where a parameter's gradient is added up, if there is such a place: ``main_grad`` under 16-bit training."""
    into: Tensor | None = getattr(param, "main_grad", None)
    return param.grad if into is None else into


def _add_sum(into: Tensor, grad_to: Tensor) -> None:
    into += grad_to.sum(0, dtype=into.dtype)
