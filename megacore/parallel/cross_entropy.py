"""Output matrix and cross-entropy in one, over a vocabulary that is split over tp (Shoeybi et al. 2019, section 3).

With l the logits of a token, y its target, Z = sum exp(l), V the vocabulary and e the label smoothing:

    loss = log Z - (1 - e) l_y - e mean(l)          z = (log Z)^2  (PaLM, section 5)

Logits are never gathered. Each rank exponentiates against the largest of *its own* logits, and only vectors of one
number per token travel: the largest logit (max), then the sums of exp, of the target's logit and, with smoothing, of
all logits. Backward needs softmax = exp(l - own max) * exp(own max - max) / Z, so the exponentials take the logits'
place, and the logits' gradient takes theirs.

Soft caps bound logits before all of this: l = c tanh(x / c) of what the matrix gives (Gemma 2, 2024, section 2). Their
slope 1 - (l / c)^2 is found from the exponentials: l = log exp(l - own max) + own max. Where a far smaller logit than
the largest left none, its probability is 0 and so is its gradient, unless labels are smoothed (a rule of the config
keeps that apart); the target's logit is kept.

On the way, tokens go in chunks through the matrix product and the passes over its result, so that a chunk's logits
are still in cache; and all microbatches use one piece of memory, the largest a step needs. Under 16-bit training this
memory has 16 bits, while every chunk is computed in float32, and so are all sums and the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megacore.data.documents import IGNORE
from megacore.kernels.reference import logit_statistics
from megacore.layout.partition import Piece
from megacore.mesh.collectives import all_gather, all_gather_start, all_reduce, all_reduce_start, reduce_scatter_start
from megacore.parallel.tensor import TensorParallel
from megacore.parallel.wgrad import WeightGradients

CHUNK = 1 << 20
"""Logits that go through a chunk at once."""


@dataclass(frozen=True)
class Vocabulary:
    """The whole vocabulary's size, the rows that this rank holds (None: there are more ranks than rows), what takes
    the statistics of logits (as in ``kernels.reference``), and memory for logits that is not in use."""

    size: int
    piece: Piece | None
    statistics: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = logit_statistics
    spare: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def first_row(self) -> int:
        """The first row this rank holds."""
        return self.piece.start if self.piece else 0

    def take(self, num_tokens: int, like_vh: Tensor) -> Tensor:
        """Memory for logits [t, v]; to be given back to ``spare``."""
        shape = (num_tokens, like_vh.shape[0])
        for place, tensor in enumerate(self.spare):
            if tensor.shape == shape:
                return self.spare.pop(place)
        self.spare.clear()
        return like_vh.new_empty(shape)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_th: Tensor,
        weight_vh: Tensor,
        label_t: Tensor,
        vocab: Vocabulary,
        tp: TensorParallel,
        smoothing: float,
        softcap: float,
        backward_follows: bool,
    ) -> tuple[Tensor, Tensor]:
        whole_th = all_gather(x_th, tp.group) if tp.sequence else x_th
        local_t = label_t - vocab.first_row
        inside_t = (local_t >= 0) & (local_t < weight_vh.shape[0])
        exp_tv = vocab.take(len(whole_th), weight_vh)
        own_max_t, parts = _exponentials(exp_tv, whole_th, weight_vh, local_t, vocab, tp, softcap)
        parts = parts if smoothing else parts[:2].clone()
        local_t = local_t.clamp(0, max(weight_vh.shape[0] - 1, 0))
        caps = (own_max_t, parts[1].clone()) if softcap else ()
        max_t = all_reduce(own_max_t.clone(), tp.group, "max")
        # a rank without rows has -inf as its own maximum, and exp(-inf - max) = 0 is its weight
        rescale_t = torch.exp(own_max_t - max_t)
        parts[0] *= rescale_t
        parts = all_reduce(parts, tp.group)
        log_z_t = parts[0].log().add_(max_t)
        loss_t = log_z_t - (1 - smoothing) * parts[1]
        if smoothing:
            loss_t -= smoothing / vocab.size * parts[2]
        valid_t = label_t != IGNORE
        ctx.save_for_backward(
            x_th if tp.regather else whole_th, local_t, inside_t, valid_t, log_z_t, rescale_t / parts[0], *caps
        )
        ctx.exp_tv, ctx.weight, ctx.vocab, ctx.tp = exp_tv, weight_vh, vocab, tp
        ctx.smoothing, ctx.softcap = smoothing, softcap
        if not backward_follows:
            vocab.spare.append(exp_tv)
        return loss_t * valid_t, log_z_t.square() * valid_t

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_loss_t: Tensor, grad_z_t: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None, None, None, None, None]:
        x_th, local_t, inside_t, valid_t, log_z_t, to_softmax_t, *caps = ctx.saved_tensors
        exp_tv, weight_vh, tp, smoothing = ctx.exp_tv, ctx.weight, ctx.tp, ctx.smoothing
        gathering = all_gather_start(x_th, tp.group) if tp.sequence and tp.regather else None
        grad_loss_t = grad_loss_t * valid_t
        softmax_t = (grad_loss_t + 2 * log_z_t * grad_z_t * valid_t) * to_softmax_t
        target_t = (1 - smoothing) * grad_loss_t * inside_t
        spread_t = smoothing / ctx.vocab.size * grad_loss_t if smoothing else None
        if caps:
            target_t *= _slope(caps[1].clone(), ctx.softcap)
        grad_th = weight_vh.new_empty(len(exp_tv), weight_vh.shape[1])
        for rows in _chunks(exp_tv):
            chunk = exp_tv[rows].to(softmax_t.dtype)
            slope = _slope(chunk.log().add_(caps[0][rows, None]), ctx.softcap) if caps else None
            chunk.mul_(softmax_t[rows, None])
            if spread_t is not None:
                chunk.sub_(spread_t[rows, None])
            if slope is not None:
                chunk.mul_(slope)
            if chunk.shape[1]:
                chunk.scatter_add_(1, local_t[rows, None], -target_t[rows, None])
            if chunk.dtype != exp_tv.dtype:
                chunk = exp_tv[rows].copy_(chunk)
            grad_th[rows] = tp.linear.dgrad(chunk, weight_vh)
        start = reduce_scatter_start if tp.sequence else all_reduce_start
        summing = start(grad_th, tp.group)
        if gathering is not None:
            x_th = gathering.wait()
        # never put off: logits are by far the largest tensor, and their memory is wanted for the next microbatch
        grad_weight = WeightGradients().linear(tp.linear, weight_vh, x_th, exp_tv)
        ctx.vocab.spare.append(exp_tv)
        ctx.exp_tv = None
        return summing.wait(), grad_weight, None, None, None, None, None, None


def _slope(logits: Tensor, softcap: float) -> Tensor:
    """The slope of the soft cap where it gives these logits, in their place."""
    return logits.div_(softcap).clamp_(-1, 1).square_().neg_().add_(1)


def _exponentials(
    exp_tv: Tensor,
    x_th: Tensor,
    weight_vh: Tensor,
    local_t: Tensor,
    vocab: Vocabulary,
    tp: TensorParallel,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Fill exp [t, v] with exp(logit - own max).

    Returns own max [t] and parts [3, t]: the sum of exp, the target's logit (0 where it is elsewhere), the sum of
    logits.
    """
    dtype = torch.promote_types(x_th.dtype, torch.float32)
    parts = x_th.new_zeros(3, len(x_th), dtype=dtype)
    own_max_t = x_th.new_full((len(x_th),), -torch.inf, dtype=dtype)
    if not exp_tv.shape[1]:
        return own_max_t, parts
    for rows in _chunks(exp_tv):
        logits = tp.linear.forward(x_th[rows], weight_vh)
        if softcap:
            logits = logits.to(dtype).div_(softcap).tanh_().mul_(softcap)
        own_max_t[rows], parts[:, rows], exp_tv[rows] = vocab.statistics(logits, local_t[rows])
    return own_max_t, parts


def _chunks(exp_tv: Tensor) -> list[slice]:
    step = max(1, CHUNK // max(1, exp_tv.shape[1]))
    return [slice(start, start + step) for start in range(0, len(exp_tv), step)]


def linear_cross_entropy(
    x_th: Tensor,
    weight_vh: Tensor,
    label_t: Tensor,
    vocab: Vocabulary,
    tp: TensorParallel,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Per token: the loss [t] and the squared log-partition z [t] of the logits x w^T, bounded by ``softcap`` where it
    is not 0; both 0 where the label is IGNORE.

    x [t, h] (a run of the tokens under sequence parallelism), weight [v, h] this rank's rows, labels [t] of all tokens.
    """
    backward_follows = torch.is_grad_enabled() and (x_th.requires_grad or weight_vh.requires_grad)
    return _LinearCrossEntropy.apply(x_th, weight_vh, label_t, vocab, tp, label_smoothing, softcap, backward_follows)
