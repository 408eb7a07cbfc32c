"""Cross-entropy over a vocabulary that is split over tp, without ever gathering the logits (Shoeybi et al. 2019,
section 3).

With l the logits of a token, y its target, Z = sum exp(l), V the vocabulary and e the label smoothing:

    loss = log Z - (1 - e) l_y - e mean(l)          z = (log Z)^2  (PaLM, section 5)

Each rank exponentiates against the largest of *its own* logits, in one pass, and only vectors of one number per token
travel: the largest logit (max), then the sums of exp, of the target's logit and, with smoothing, of all logits.
Backward needs softmax = exp(l - own max) * exp(own max - max) / Z, so the exponentials are kept in the logits' place.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megacore.layout.partition import Piece
from megacore.mesh.collectives import all_reduce
from megacore.mesh.group import Group

IGNORE = -100
"""Label of a token that is not a target."""

CHUNK = 1 << 16
"""Logits handled at once, so that a chunk's passes stay in cache."""


@dataclass(frozen=True)
class Vocabulary:
    """The whole vocabulary's size, the rows this rank holds, and the group that holds the others."""

    size: int
    piece: Piece | None
    group: Group


class _CrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, logits_tv: Tensor, label_t: Tensor, vocab: Vocabulary, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        start, size = (vocab.piece.start, vocab.piece.size) if vocab.piece else (0, 0)
        local_t = label_t - start
        inside_t = (local_t >= 0) & (local_t < size)
        local_t = local_t.clamp(0, max(size - 1, 0))
        own_max_t, parts = _exponentiate(logits_tv, local_t, inside_t, smoothing > 0)
        max_t = all_reduce(own_max_t.clone(), vocab.group, "max") if vocab.group.size > 1 else own_max_t
        # a rank without rows has -inf as its own maximum, and exp(-inf - max) = 0 is its weight
        rescale_t = torch.exp(own_max_t - max_t)
        parts[0] *= rescale_t
        parts = all_reduce(parts, vocab.group)
        log_z_t = parts[0].log().add_(max_t)
        loss_t = log_z_t - (1 - smoothing) * parts[1]
        if smoothing:
            loss_t -= smoothing / vocab.size * parts[2]
        valid_t = label_t != IGNORE
        loss_t *= valid_t
        ctx.save_for_backward(logits_tv, local_t, inside_t, valid_t, log_z_t, rescale_t / parts[0])
        ctx.smoothing, ctx.vocab = smoothing, vocab
        return loss_t, log_z_t.square() * valid_t

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss_t: Tensor, grad_z_t: Tensor) -> tuple[Tensor, None, None, None]:
        exp_tv, local_t, inside_t, valid_t, log_z_t, to_softmax_t = ctx.saved_tensors
        grad_loss_t = grad_loss_t * valid_t
        softmax_share_t = (grad_loss_t + 2 * log_z_t * grad_z_t * valid_t) * to_softmax_t
        exp_tv.mul_(softmax_share_t[:, None])
        if ctx.smoothing:
            exp_tv.sub_(grad_loss_t[:, None], alpha=ctx.smoothing / ctx.vocab.size)
        if exp_tv.shape[1]:
            target_t = (1 - ctx.smoothing) * grad_loss_t * inside_t
            exp_tv.scatter_add_(1, local_t[:, None], -target_t[:, None])
        return exp_tv, None, None, None


def _exponentiate(logits_tv: Tensor, local_t: Tensor, inside_t: Tensor, want_sum: bool) -> tuple[Tensor, Tensor]:
    """Replace the logits by exp(l - own max); return own max [t] and the parts [2 or 3, t]: sum exp, target logit, sum."""
    num_tokens, num_rows = logits_tv.shape
    parts = logits_tv.new_zeros(3 if want_sum else 2, num_tokens)
    own_max_t = logits_tv.new_full((num_tokens,), -torch.inf)
    if not num_rows:
        return own_max_t, parts
    parts[1] = logits_tv.gather(1, local_t[:, None]).squeeze(1) * inside_t
    step = max(1, CHUNK // num_rows)
    for start in range(0, num_tokens, step):
        chunk = logits_tv[start : start + step]
        if want_sum:
            parts[2, start : start + step] = chunk.sum(1)
        largest = own_max_t[start : start + step]
        torch.amax(chunk, 1, out=largest)
        chunk.sub_(largest[:, None]).exp_()
        torch.sum(chunk, 1, out=parts[0, start : start + step])
    return own_max_t, parts


def vocab_parallel_cross_entropy(
    logits_tv: Tensor, label_t: Tensor, vocab: Vocabulary, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Per token: the loss [t] and the squared log-partition z [t]; both 0 where the label is IGNORE.

    logits [t, v]: this rank's part of the vocabulary. They are overwritten: a caller must not use them afterwards.
    """
    return _CrossEntropy.apply(logits_tv, label_t, vocab, label_smoothing)
