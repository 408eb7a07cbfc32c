"""Every fused operation in plain PyTorch: the meaning that all other backends are tested against.

Means, variances and softmaxes of 16-bit numbers are float32.

Shapes: x [..., h]; q [b, n, s, d], k and v [b, m, s, d] where m divides n (grouped queries).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dim (Zhang and Sennrich 2019)."""
    wide = wide_of(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (wide_of(weight) + offset)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim (Ba et al. 2016)."""
    wide = wide_of(x)
    centred = wide - wide.mean(-1, keepdim=True)
    return (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first r dims of each head. x [b, s, n, d]; cos, sin [1 or b, s, 1, r/2].

    Pairs are (i, i + r/2), as in Llama's HF layout.
    """
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


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


def wide_of(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
