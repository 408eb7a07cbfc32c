"""RMSNorm of all of a token's query heads at once, and of all its key heads, where tp splits the heads (OLMo-2).

With x a token's N numbers over all ranks, w the weight, g the gradient of y = r x w, r = 1 / sqrt(mean(x^2) + eps):

    dx = r w g - r^3 / N x sum(g w x)          dw = sum over tokens of r g x

Both sums run over all ranks' heads: one number per token and kind travels in forward, and one in backward. A key head
that several ranks hold counts once: each of its c copies adds 1/c of its squares. In backward, a copy's g is that of
its own query heads, and the c copies' dx are summed where the heads are projected; so is each one's part of the sum.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megacore.mesh.collectives import all_reduce
from megacore.mesh.group import Group


@dataclass(frozen=True)
class HeadNorm:
    """``counts``: how many numbers the means of queries and of keys run over, all ranks' together; a head that is held
    more than once is counted as often. ``offset`` is added to the weights."""

    counts: tuple[int, int]
    eps: float
    offset: float
    group: Group

    def __call__(self, qk_bsnd: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        """Query and key heads [b, s, n+m, d], this rank's, to the same; weights [n*d] and [m*d]."""
        return _NormHeads.apply(qk_bsnd, q_weight, k_weight, self)


class _NormHeads(Function):
    """Saves its input, which the projection's result is, and two numbers per token; float32 at least."""

    @staticmethod
    def forward(ctx: Any, qk_bsnd: Tensor, q_weight: Tensor, k_weight: Tensor, norm: HeadNorm) -> Tensor:
        dtype = torch.promote_types(qk_bsnd.dtype, torch.float32)
        factors = _factors((q_weight, k_weight), qk_bsnd.shape[-1], norm.offset, dtype)
        parts = qk_bsnd.split([len(factor) for factor in factors], 2)
        means = [
            torch.linalg.vector_norm(part, dim=(2, 3), dtype=dtype).square_().div_(count)
            for part, count in zip(parts, norm.counts, strict=True)
        ]
        inverse = all_reduce(torch.stack(means), norm.group).add_(norm.eps).rsqrt_()
        ctx.save_for_backward(qk_bsnd, q_weight, k_weight, inverse)
        ctx.norm = norm
        normed = [
            torch.mul(part, inverse_bs[..., None, None]).mul_(factor)
            for part, inverse_bs, factor in zip(parts, inverse, factors, strict=True)
        ]
        return torch.cat(normed, 2).to(qk_bsnd.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_bsnd: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        qk_bsnd, q_weight, k_weight, inverse = ctx.saved_tensors
        norm, dtype = ctx.norm, inverse.dtype
        factors = _factors((q_weight, k_weight), qk_bsnd.shape[-1], norm.offset, dtype)
        sizes = [len(factor) for factor in factors]
        parts, grads = qk_bsnd.split(sizes, 2), grad_bsnd.to(dtype).split(sizes, 2)
        products = [grad * part for grad, part in zip(grads, parts, strict=True)]
        grad_weights = [
            torch.einsum("bsnd,bs->nd", product, inverse_bs).reshape(-1)
            for product, inverse_bs in zip(products, inverse, strict=True)
        ]
        sums = [torch.einsum("bsnd,nd->bs", product, factor) for product, factor in zip(products, factors, strict=True)]
        shares = all_reduce(torch.stack(sums), norm.group).mul_(inverse).mul_(inverse).mul_(inverse)
        out = []
        for part, grad, factor, inverse_bs, share_bs, count in zip(
            parts, grads, factors, inverse, shares, norm.counts, strict=True
        ):
            of_part = torch.mul(grad, factor).mul_(inverse_bs[..., None, None])
            out.append(of_part.addcmul_(part, share_bs.div(count)[..., None, None], value=-1))
        grad_q, grad_k = (grad.to(q_weight.dtype) for grad in grad_weights)
        return torch.cat(out, 2).to(qk_bsnd.dtype), grad_q, grad_k, None


def _factors(weights: tuple[Tensor, Tensor], d: int, offset: float, dtype: torch.dtype) -> list[Tensor]:
    """What each head's numbers are multiplied by, [n, d] and [m, d]."""
    return [weight.view(-1, d).to(dtype) + offset for weight in weights]
