"""Every fused operation in plain PyTorch: the meaning that all other backends are tested against.

Means, variances and softmaxes of 16-bit numbers are float32.

Shapes: x [..., h]; q [b, n, s, d], k and v [b, m, s, d] where m divides n (grouped queries).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megacore.kernels.fp8.formats import E4M3, E5M2, amax_of, encode


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dim (Zhang and Sennrich 2019)."""
    wide = wide_of(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (wide_of(weight) + offset)).to(x.dtype)


def rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """The norm of the residual stream after a sublayer's output x was added, and that sum."""
    total = x + residual
    return rms_norm(total, weight, eps, offset), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim (Ba et al. 2016)."""
    wide = wide_of(x)
    centred = wide - wide.mean(-1, keepdim=True)
    return (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias).to(x.dtype)


def layer_norm_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As ``rms_norm_add``, with ``layer_norm``."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first r dims of each head. x [b, s, n, d]; cos, sin [1 or b, s, 1, r/2].

    Pairs are (i, i + r/2), as in Llama's HF layout.
    """
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def rope_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As ``rope``, with the pairs (2i, 2i + 1) of the original paper (Su et al. 2021)."""
    turned = 2 * cos.shape[-1]
    first, second = x[..., 0:turned:2], x[..., 1:turned:2]
    pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((pairs.flatten(-2), x[..., turned:]), -1)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up of x [..., 2f] = [gate, up] -> [..., f] (Shazeer 2020)."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def geglu(x: Tensor) -> Tensor:
    """gelu(gate) * up of x [..., 2f] = [gate, up] -> [..., f], tanh form."""
    gate, up = x.chunk(2, -1)
    return gelu(gate) * up


def gelu(x: Tensor) -> Tensor:
    """GELU in the tanh form of GPT-2 (Hendrycks and Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias), tanh form; x [..., f], bias [f]."""
    return gelu(wide_of(x) + bias).to(x.dtype)


def gelu_erf(x: Tensor) -> Tensor:
    """GELU by the error function (Hendrycks and Gimpel 2016)."""
    return F.gelu(x)


def relu2(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al. 2021)."""
    return F.relu(x).square()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    keep: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """softmax(scale q k^T + mask) v -> [b, n, s, d].

    ``mask`` broadcasts to [b, n, s, s]: boolean (True: visible) or added to the scores. ``keep`` [b, n, s, s]
    multiplies the probabilities (dropout: 0 or 1 / (1 - p)). With ``softcap`` c a score x is first bounded to
    c tanh(x / c) (Gemma 2, 2024, section 2).
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if softcap:
        scores = (wide_of(q @ k.transpose(-2, -1)) * (scale / softcap)).tanh() * softcap
    else:
        scores = q @ k.transpose(-2, -1) * scale
    if causal:
        scores = scores.masked_fill(
            ~torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(), -torch.inf
        )
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    probabilities = wide_of(scores).softmax(-1)
    if keep is not None:
        probabilities = probabilities * keep
    return probabilities.to(v.dtype) @ v


def softmax(scores: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Over keys, of scale times scores [b, n, q, k], of what is visible; 0 in rows that see nothing.

    ``mask``, boolean (True: visible), broadcasts to the scores. ``causal``: the last query sees all keys, each one
    before it a key less.
    """
    visible = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    if causal:
        visible = visible.tril(scores.shape[-1] - scores.shape[-2])
    if mask is not None:
        visible = visible & mask
    wide = (wide_of(scores) * scale).masked_fill(~visible, -torch.inf)
    largest = wide.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(wide.dtype).min)
    weights = (wide - largest).exp()
    total = weights.sum(-1, keepdim=True)
    return (weights / total.masked_fill(total == 0, 1)).to(scores.dtype)


def logit_statistics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a rank contributes to cross-entropy over a split vocabulary. logits [t, v], target [t]: a column, or any
    other number where the target is not in this part of the vocabulary.

    Returns each row's largest logit [t]; the sums [3, t] of exp(logit - largest), of the target's logit (0 where it is
    elsewhere), and of logits; exp(logit - largest) [t, v] in the dtype of the logits. The first two are float32 at
    least. Nothing has a gradient.
    """
    wide = wide_of(logits.detach())
    sums = wide.new_zeros(3, len(wide))
    if not wide.shape[1]:
        return wide.new_full((len(wide),), -torch.inf), sums, logits.new_empty(logits.shape)
    largest = wide.amax(1)
    exponentials = (wide - largest[:, None]).exp()
    inside = (target >= 0) & (target < wide.shape[1])
    hit = wide.gather(1, torch.where(inside, target, 0)[:, None]).squeeze(1)
    torch.stack((exponentials.sum(1), torch.where(inside, hit, 0), wide.sum(1)), out=sums)
    return largest, sums, exponentials.to(logits.dtype)


def squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of each tensor: float64 [number of tensors]."""
    sums = [tensor.double().square().sum() for tensor in tensors]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64)


def bias_dropout_add(x: Tensor, bias: Tensor, residual: Tensor, keep: Tensor) -> Tensor:
    """residual + (x + bias) keep, where keep, float32 at least, is 0 or 1 / (1 - p); bias [h], all else [..., h]."""
    return (residual + (wide_of(x) + bias) * keep).to(x.dtype)


def order_of(choice: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Of choices [t, k] among experts: their places in the flat list, sorted by expert and then by place [t k], and
    how many each expert has [num_experts]."""
    flat = choice.flatten()
    experts = torch.arange(num_experts, device=choice.device)
    return flat.argsort(stable=True), (flat[:, None] == experts).sum(0)


def inverse_of(order: Tensor) -> Tensor:
    """Where in ``order`` each place stands."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def permute(x: Tensor, choice: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of x [t, h] for the experts that they chose [t, k]: one for each choice, sorted by expert [t k, h]; with
    their order and the experts' counts (``order_of``)."""
    order, counts = order_of(choice, num_experts)
    return x[order // choice.shape[1]], order, counts


def unpermute(rows: Tensor, order: Tensor, weight: Tensor) -> Tensor:
    """The way back: to each token [t, h] the sum over its k choices of weight [t, k] times the expert's row."""
    own = wide_of(rows)[inverse_of(order)].unflatten(0, weight.shape)
    return (own * weight[..., None]).sum(1).to(rows.dtype)


def grouped_product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x w^T [n, o] of rows [n, i] sorted by expert, each with its expert's w of weight [e, o, i]; expert number i has
    counts[i] rows, and all together have n."""
    ends = counts.cumsum(0)
    expert = torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True)
    out = x.new_zeros(len(x), weight.shape[1])
    for number, own in enumerate(weight):
        out = torch.where((expert == number)[:, None], x @ own.t(), out)
    return out


def quantise(x: Tensor, scale: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """x times ``scale`` (float32 scalar) in E4M3 or, of gradients, E5M2, and the largest absolute value of x (float32
    scalar). See ``fp8.formats``."""
    return encode(x, scale, E5M2 if gradient else E4M3), amax_of(x)


def wide_of(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
