"""A pipeline stage that only takes time: what it would compute, it sleeps.

Sleeping ranks do not slow each other down, however few cores they share, so that what a schedule idles can be measured
on a laptop; messages, autograd and deferred weight gradients are the engine's own.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megacore.kernels.linear import LinearKernel
from megacore.model.inputs import Inputs
from megacore.model.stage import Loss
from megacore.parallel.wgrad import WeightGradients


@dataclass(frozen=True)
class Seconds:
    """What each part of a stage takes; a whole backward takes ``input_grad`` and ``weight_grad``."""

    forward: float
    input_grad: float
    weight_grad: float


class _Sleep(Function):
    @staticmethod
    def forward(ctx: Any, x_th: Tensor, weight: Tensor, stage: "SleepingStage") -> Tensor:
        ctx.stage, ctx.weight = stage, weight
        ctx.save_for_backward(x_th)
        time.sleep(stage.seconds.forward)
        return x_th.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_th: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (x_th,), stage = ctx.saved_tensors, ctx.stage
        time.sleep(stage.seconds.input_grad)
        return grad_th, stage.wgrad.linear(stage.kernel, ctx.weight, x_th, grad_th), None


class SleepingStage(nn.Module):
    """x [t, h] -> x, or its sum as the loss on the last stage, as ``Stage`` does; takes ``seconds``."""

    dtype = torch.float32

    def __init__(self, seconds: Seconds, hidden: int, wgrad: WeightGradients, first: bool, last: bool) -> None:
        super().__init__()
        self.seconds, self.hidden, self.wgrad, self.first, self.last = seconds, hidden, wgrad, first, last
        self.weight = nn.Parameter(torch.zeros(()))
        self.weight.grad = torch.zeros(())  # what is there already can be added to later
        self.kernel = LinearKernel(torch.mul, torch.mul, lambda *_: time.sleep(seconds.weight_grad))

    def boundary_shape(self, inputs: Inputs) -> tuple[int, int]:
        """(t, h) of what stages hand on."""
        return inputs.token_bs.numel(), self.hidden

    def forward(self, inputs: Inputs, x_th: Tensor | None = None, logits: bool = False) -> Tensor | Loss:
        """As ``Stage``; ``logits`` is never asked for."""
        x_th = torch.zeros(self.boundary_shape(inputs)) if x_th is None else x_th
        x_th = _Sleep.apply(x_th, self.weight, self)
        return Loss(x_th.sum(), x_th.detach().sum(), inputs.num_targets) if self.last else x_th
