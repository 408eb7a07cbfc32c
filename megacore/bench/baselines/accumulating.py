"""A training step over several microbatches, by whoever shares the batch among ranks: what all of torch's ways do."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn, optim
from torch.nn import functional

from megacore.bench.baselines.plain_llama import Step

Sums = Callable[[bool], AbstractContextManager[object]]
"""Given whether a microbatch is the last one: what to hold open around it, so that gradients are summed when due."""


def accumulating_step(
    model: nn.Module, optimizer: optim.Optimizer, clip_grad: float, num_microbatches: int, sums: Sums
) -> Step:
    """Forward and backward of each microbatch, then clip and update. (tokens, labels [b, s] of this rank) -> loss."""
    parameters = list(model.parameters())

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        loss = forward_backward(model, tokens, labels, num_microbatches, sums)
        if clip_grad:
            torch.nn.utils.clip_grad_norm_(parameters, clip_grad, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def forward_backward(model: nn.Module, tokens: Tensor, labels: Tensor, num_microbatches: int, sums: Sums) -> Tensor:
    """Adds the gradients of the mean loss, which it returns, to the parameters'."""
    losses = []
    cut: Sequence[tuple[Tensor, Tensor]] = list(zip(tokens.chunk(num_microbatches), labels.chunk(num_microbatches)))
    for number, (some_tokens, some_labels) in enumerate(cut):
        with sums(number == num_microbatches - 1):
            logits = model(some_tokens)
            loss = functional.cross_entropy(logits.flatten(0, 1), some_labels.flatten()) / num_microbatches
            loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()
