"""The contract of a matrix product in training: forward, dgrad (to the input) and wgrad (into the gradient buffer)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megacore.kernels import native

WIDENED = 1 << 20
"""16-bit gradients that are made float32 at once."""


@dataclass(frozen=True)
class LinearKernel:
    """y [t, o] = x [t, i] w^T [i, o] and its two gradients.

    forward(x, w): y. dgrad(grad [t, o], w [o, i]): [t, i]. wgrad(into [o, i], x, grad): adds grad^T x in place; into
    may be wider than x and grad, and then the sum over tokens is never in their 16 bits.
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    dgrad: Callable[[Tensor, Tensor], Tensor]
    wgrad: Callable[[Tensor, Tensor, Tensor], object]


def _dgrad(grad_to: Tensor, weight_oi: Tensor) -> Tensor:
    return grad_to @ weight_oi


@torch.no_grad()
def _wgrad(into_oi: Tensor, x_ti: Tensor, grad_to: Tensor) -> Tensor:
    if x_ti.dtype == into_oi.dtype:
        return torch.addmm(into_oi, grad_to.t(), x_ti, out=into_oi)  # which torch counts; it does not count addmm_
    step = max(1, WIDENED // max(1, grad_to.shape[1]))
    for x, grad in zip(x_ti.split(step), grad_to.split(step), strict=True):
        torch.addmm(into_oi, grad.to(into_oi.dtype).t(), x.to(into_oi.dtype), out=into_oi)
    return into_oi


def _widened_forward(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x.float(), weight.float()).to(x.dtype)


def _widened_dgrad(grad_to: Tensor, weight_oi: Tensor) -> Tensor:
    return (grad_to.float() @ weight_oi.float()).to(grad_to.dtype)


def widened_refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why products in float32 of fp16 numbers cannot serve, or ''."""
    if device.type != "cpu" or dtype != torch.float16:
        return f"made for float16 on CPU, not {dtype} on {device.type}"
    return ""


def _wgrad_from_16_bits(into_oi: Tensor, x_ti: Tensor, grad_to: Tensor) -> Tensor:
    return into_oi.add_(torch.mm(grad_to.t(), x_ti, out_dtype=into_oi.dtype))


def from_16_bits_refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why a product of 16-bit numbers that ends in float32 cannot serve, or ''."""
    if device.type != "cuda" or dtype.itemsize != 2:
        return f"made for 16-bit numbers on CUDA, not {dtype} on {device.type}"
    return ""


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


def _native_forward(x: Tensor, weight: Tensor) -> Tensor:
    return _onednn(x, weight) if x.dtype == torch.float32 else functional.linear(x, weight)


def _native_dgrad(grad_to: Tensor, weight_oi: Tensor) -> Tensor:
    return _onednn_dgrad(grad_to, weight_oi) if grad_to.dtype == torch.float32 else grad_to @ weight_oi


@torch.no_grad()
def _native_wgrad(into_oi: Tensor, x_ti: Tensor, grad_to: Tensor) -> Tensor:
    if into_oi.dtype != torch.float32 or not into_oi.is_contiguous():
        return _wgrad(into_oi, x_ti, grad_to)
    torch.ops.megacore_cpu.wgrad_(into_oi, x_ti.contiguous(), grad_to.contiguous())
    return into_oi


def native_refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why csrc/cpu's weight gradients cannot serve, or ''."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return f"made for float32 and bfloat16 on CPU, not {dtype} on {device.type}"
    if reason := native.unavailable():
        return reason
    if not torch.ops.megacore_cpu.wgrad_supported(dtype == torch.bfloat16):
        return "this processor has no " + ("AVX-512 dot products of bfloat16" if dtype.itemsize == 2 else "AVX-512")
    return onednn_refuses(device, dtype) if dtype == torch.float32 else ""


REFERENCE = LinearKernel(functional.linear, _dgrad, _wgrad)
"""torch's own products (MKL, oneDNN for bf16, cuBLAS)."""

WIDENED_FP16 = LinearKernel(_widened_forward, _widened_dgrad, _wgrad)
"""By way of float32: torch's own products of fp16 matrices took 8 to 100 times as long on an AMD CPU."""

FROM_16_BITS = LinearKernel(functional.linear, _dgrad, _wgrad_from_16_bits)
"""cuBLAS reads 16 bits and writes float32. Not run on a GPU yet."""

ONEDNN = LinearKernel(_onednn, _onednn_dgrad, _wgrad)
"""oneDNN forward and to the input, measured 12-120% faster than MKL on AMD CPUs; MKL adds in place."""

NATIVE = LinearKernel(_native_forward, _native_dgrad, _native_wgrad)
"""Weight gradients by csrc/cpu, whose sums are float32 and go straight into the buffer. On an AMD CPU with AVX-512, of
float32 1.8 times as fast as MKL; of bfloat16 four times as fast as MKL's product of widened operands."""
