"""Where weight gradients go: the one place that adds to a parameter's gradient buffer by hand."""

from torch import Tensor

from megacore.kernels.linear import LinearKernel


def accumulate_linear(kernel: LinearKernel, weight: Tensor, x_ti: Tensor, grad_to: Tensor) -> Tensor | None:
    """Weight gradient of y = x w^T. x [t, in], grad [t, out] -> w's [out, in].

    Where ``weight.grad`` is there already (a view of the flat gradient buffer), the product is added to it by the GEMM
    itself and None is returned, so nothing of the weight's size is allocated; otherwise the gradient is returned.
    """
    if weight.grad is None:
        return grad_to.t() @ x_ti
    kernel.wgrad(weight.grad, x_ti, grad_to)
    return None


def accumulate_bias(bias: Tensor, grad_to: Tensor) -> Tensor | None:
    """Bias gradient: the sum over tokens. grad [t, out]; as ``accumulate_linear``."""
    if bias.grad is None:
        return grad_to.sum(0)
    bias.grad += grad_to.sum(0)
    return None


def accumulate_rows(weight: Tensor, index_t: Tensor, grad_th: Tensor) -> Tensor | None:
    """Gradient of a look-up: add row t of grad [t, h] to row ``index_t[t]``; as ``accumulate_linear``."""
    target = weight.new_zeros(weight.shape) if weight.grad is None else weight.grad
    target.index_add_(0, index_t, grad_th)
    return target if weight.grad is None else None
