"""The contract of a matrix product in training: forward, dgrad (to the input) and wgrad (into the gradient buffer)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class LinearKernel:
    """y [t, o] = x [t, i] w^T [i, o] and its two gradients.

    forward(x, w): y. dgrad(grad [t, o], w [o, i]): [t, i]. wgrad(into [o, i], x, grad): adds grad^T x in place.
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    dgrad: Callable[[Tensor, Tensor], Tensor]
    wgrad: Callable[[Tensor, Tensor, Tensor], object]


def _dgrad(grad_to: Tensor, weight_oi: Tensor) -> Tensor:
    return grad_to @ weight_oi


def _wgrad(into_oi: Tensor, x_ti: Tensor, grad_to: Tensor) -> Tensor:
    return into_oi.addmm_(grad_to.t(), x_ti)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """x w^T by oneDNN, which torch itself only takes for 16-bit numbers."""
    if not x.shape[1]:  # oneDNN refuses sums of nothing (a rank without rows of a tiny vocabulary sends back zeros)
        return x @ weight.t()
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _onednn_dgrad(grad_to: Tensor, weight_oi: Tensor) -> Tensor:
    return _onednn(grad_to, weight_oi.t())


def onednn_refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why oneDNN's product cannot serve, or ''."""
    if device.type != "cpu" or dtype != torch.float32:
        return f"made for float32 on CPU, not {dtype} on {device.type}"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this build of torch has no oneDNN"
    return ""


REFERENCE = LinearKernel(functional.linear, _dgrad, _wgrad)
"""torch's own products (MKL, cuBLAS)."""

ONEDNN = LinearKernel(_onednn, _onednn_dgrad, _wgrad)
"""oneDNN forward and to the input, measured 12-20% faster than MKL on an AMD CPU; MKL is the faster one for wgrad."""
