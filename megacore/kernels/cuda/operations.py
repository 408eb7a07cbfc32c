"""The operations of csrc/cuda as the table calls them, with their fake twins and gradients.

Imported only where the library could be loaded: raises ImportError elsewhere.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from megacore.kernels.adamw import Moments, Rates
from megacore.kernels.cuda import library
from megacore.kernels.fp8.formats import E4M3, E5M2

if reason := library.unavailable():
    raise ImportError(reason)

ops = torch.ops.megacore_cuda

Grads = tuple[Tensor | None, ...]


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _per_row(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@register_fake("megacore_cuda::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return _like(x), _per_row(x)


@register_fake("megacore_cuda::rms_norm_add")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(x), _per_row(x)


@register_fake("megacore_cuda::rms_norm_backward")
def _(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    return _like(x), _like(weight)


@register_fake("megacore_cuda::layer_norm")
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _per_row(x), _per_row(x)


@register_fake("megacore_cuda::layer_norm_add")
def _(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(x), _like(x), _per_row(x), _per_row(x)


@register_fake("megacore_cuda::layer_norm_backward")
def _(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(weight), _like(weight)


@register_fake("megacore_cuda::gated")
def _(x: Tensor, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@register_fake("megacore_cuda::gated_backward")
def _(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    return _like(x)


@register_fake("megacore_cuda::bias_gelu")
def _(x: Tensor, bias: Tensor) -> Tensor:
    return _like(x)


@register_fake("megacore_cuda::bias_gelu_backward")
def _(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _like(x), _like(bias)


@register_fake("megacore_cuda::rope")
def _(x: Tensor, cos: Tensor, sin: Tensor, apart: bool, back: bool) -> Tensor:
    return _like(x)


@register_fake("megacore_cuda::rope_")
def _(x: Tensor, cos: Tensor, sin: Tensor, apart: bool, back: bool) -> None:
    return None


@register_fake("megacore_cuda::softmax")
def _(scores: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    return _like(scores)


@register_fake("megacore_cuda::softmax_backward")
def _(grad: Tensor, out: Tensor, scale: float) -> Tensor:
    return _like(out)


@register_fake("megacore_cuda::logit_statistics")
def _(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return _per_row(logits), logits.new_empty((3, rows), dtype=torch.float32), _like(logits)


@register_fake("megacore_cuda::squares")
def _(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_empty(len(tensors), dtype=torch.float64)


@register_fake("megacore_cuda::quantise")
def _(x: Tensor, scale: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=(E5M2 if gradient else E4M3).dtype), x.new_empty((), dtype=torch.float32)


@register_fake("megacore_cuda::adamw_")
def _(*arguments: Any) -> None:
    return None


def _keep_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, ctx.offset = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _rms_norm_gradients(ctx: Any, grad: Tensor, _: Tensor) -> Grads:
    x, weight, inverse = ctx.saved_tensors
    return *ops.rms_norm_backward(grad, None, x, weight, inverse, ctx.offset), None, None


def _keep_rms_norm_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _, ctx.offset = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[1], weight, output[2])


def _rms_norm_add_gradients(ctx: Any, grad: Tensor, grad_total: Tensor, _: Tensor) -> Grads:
    total, weight, inverse = ctx.saved_tensors
    grad_x, grad_weight = ops.rms_norm_backward(grad, grad_total, total, weight, inverse, ctx.offset)
    return grad_x, grad_x, grad_weight, None, None


def _keep_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(inputs[0], inputs[1], *output[1:])


def _layer_norm_gradients(ctx: Any, grad: Tensor, *_: Tensor) -> Grads:
    return *ops.layer_norm_backward(grad, None, *ctx.saved_tensors), None


def _keep_layer_norm_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(output[1], inputs[2], *output[2:])


def _layer_norm_add_gradients(ctx: Any, grad: Tensor, grad_total: Tensor, *_: Tensor) -> Grads:
    grad_x, *others = ops.layer_norm_backward(grad, grad_total, *ctx.saved_tensors)
    return grad_x, grad_x, *others, None


def _keep_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.activation = inputs
    ctx.save_for_backward(x)


def _gated_gradients(ctx: Any, grad: Tensor) -> Grads:
    return ops.gated_backward(grad, *ctx.saved_tensors, ctx.activation), None


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _bias_gelu_gradients(ctx: Any, grad: Tensor) -> Grads:
    return ops.bias_gelu_backward(grad, *ctx.saved_tensors)


def _keep_rope(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.apart, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _rope_gradients(ctx: Any, grad: Tensor) -> Grads:
    """Angles have no gradient."""
    return ops.rope(grad, *ctx.saved_tensors, ctx.apart, not ctx.back), None, None, None, None


def _keep_softmax(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.scale = inputs[3]
    ctx.save_for_backward(output)


def _softmax_gradients(ctx: Any, grad: Tensor) -> Grads:
    return ops.softmax_backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None


register_autograd("megacore_cuda::rms_norm", _rms_norm_gradients, setup_context=_keep_rms_norm)
register_autograd("megacore_cuda::rms_norm_add", _rms_norm_add_gradients, setup_context=_keep_rms_norm_add)
register_autograd("megacore_cuda::layer_norm", _layer_norm_gradients, setup_context=_keep_layer_norm)
register_autograd("megacore_cuda::layer_norm_add", _layer_norm_add_gradients, setup_context=_keep_layer_norm_add)
register_autograd("megacore_cuda::gated", _gated_gradients, setup_context=_keep_gated)
register_autograd("megacore_cuda::bias_gelu", _bias_gelu_gradients, setup_context=_keep_inputs)
register_autograd("megacore_cuda::rope", _rope_gradients, setup_context=_keep_rope)
register_autograd("megacore_cuda::softmax", _softmax_gradients, setup_context=_keep_softmax)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """As ``reference.rms_norm``."""
    return ops.rms_norm(x, weight, eps, offset)[0]


def rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """As ``reference.rms_norm_add``."""
    return ops.rms_norm_add(x, residual, weight, eps, offset)[:2]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As ``reference.layer_norm``."""
    return ops.layer_norm(x, weight, bias, eps)[0]


def layer_norm_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As ``reference.layer_norm_add``."""
    return ops.layer_norm_add(x, residual, weight, bias, eps)[:2]


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As ``reference.rope``."""
    return ops.rope(x, cos, sin, True, False)


def rope_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As ``reference.rope_interleaved``."""
    return ops.rope(x, cos, sin, False, False)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, back: bool = False) -> Tensor:
    """Turn ``x``, whose heads lie in one piece, where it lies; ``back`` by the opposite angles. No gradient goes
    through this."""
    ops.rope_(x, cos, sin, not interleaved, back)
    return x


def swiglu(x: Tensor) -> Tensor:
    """As ``reference.swiglu``."""
    return ops.gated(x, "silu")


def geglu(x: Tensor) -> Tensor:
    """As ``reference.geglu``."""
    return ops.gated(x, "gelu")


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """As ``reference.bias_gelu``."""
    return ops.bias_gelu(x, bias)


def softmax(scores: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """As ``reference.softmax``."""
    return ops.softmax(scores, mask, causal, scale)


def logit_statistics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.logit_statistics``."""
    return ops.logit_statistics(logits.detach(), target)


def squares(tensors: Sequence[Tensor]) -> Tensor:
    """As ``reference.squares``: 256 tensors a launch."""
    return ops.squares([tensor.detach() for tensor in tensors]) if tensors else torch.zeros(0, dtype=torch.float64)


def quantise(x: Tensor, scale: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """As ``reference.quantise``."""
    return ops.quantise(x.detach(), scale, gradient)


@torch.no_grad()
def adamw(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Moments,
    rates: Rates,
    taken: Tensor,
    copies: Sequence[Tensor] = (),
) -> None:
    """As ``kernels.adamw.AdamW``: 256 runs a launch, whatever their learning rates."""
    ops.adamw_(
        list(weights), list(grads), list(moments.first), list(moments.second), list(copies), moments.clock, taken,
        list(rates.lr), list(rates.weight_decay), rates.coupled, rates.beta1, rates.beta2, rates.eps,
    )  # fmt: skip
