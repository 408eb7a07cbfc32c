"""One optimizer step and one evaluation: what happens around the schedule's instructions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megacore.mesh.collectives import all_reduce
from megacore.mesh.mesh import ParallelMesh
from megacore.model.inputs import Inputs
from megacore.model.stage import Stage
from megacore.optim.groups import Optimizer
from megacore.optim.norm import GlobalNorm
from megacore.pipeline.engine import PipelineEngine, Sums
from megacore.schedule.generators.single import forward_only, one_stage
from megacore.sharding.flat import FlatParameters
from megacore.sharding.reduce import GradientReducer

CLIP_EPS = 1e-6
"""Added to the norm before dividing, as torch's clip_grad_norm_ does."""


@dataclass(frozen=True)
class StepResult:
    """Scalars on the device (float64, equal on all ranks): read them when the host has time."""

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor


class Trainer:
    """Takes a rank's microbatches through forward, backward, gradient sums, clipping and update.

    The loss is a global sum over a global count. Each microbatch's sum is differentiated with the weight
    1 / nominal targets (batch x length), which is known beforehand, and the gradients are scaled by nominal / counted
    when the count is: exactly 1 where every token is a target.
    """

    def __init__(
        self,
        stage: Stage,
        flat: FlatParameters,
        mesh: ParallelMesh,
        reducer: GradientReducer,
        norm: GlobalNorm,
        optimizer: Optimizer,
        schedule: str,
        clip_grad: float,
    ) -> None:
        self.stage, self.flat, self.mesh, self.norm, self.optimizer = stage, flat, mesh, norm, optimizer
        self.schedule, self.clip_grad = schedule, clip_grad
        self.engine = PipelineEngine({0: stage}, mesh.device, lambda _: reducer(), self._optimize)

    def step(self, microbatches: Sequence[Inputs], num_nominal: int, lr: float) -> StepResult:
        """Train on this rank's part of a batch of ``num_nominal`` tokens in all."""
        self.num_nominal, self.lr = num_nominal, lr
        self.flat.grads.data.zero_()
        instructions = one_stage(self.schedule, len(microbatches)).ranks[self.mesh.pp.rank]
        self.engine.run(instructions, microbatches, 1.0 / num_nominal)
        return self.result

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Inputs]) -> Tensor:
        """[sum of cross-entropy, number of targets] of this rank's and all other ranks' part, float64 on the device."""
        instructions = forward_only(len(microbatches)).ranks[self.mesh.pp.rank]
        return self._total(self.engine.run(instructions, microbatches))

    @torch.no_grad()
    def _optimize(self, sums: Sums) -> None:
        cross_entropy, num_targets = self._total(sums)
        to_mean = self.num_nominal / num_targets
        norm = self.norm() * to_mean
        skip = (~torch.isfinite(norm)).to(torch.float32)
        scale = to_mean
        if self.clip_grad:
            scale = to_mean * (self.clip_grad / (norm + CLIP_EPS)).clamp(max=1.0)
        self.flat.grads.data.mul_(scale.to(self.flat.grads.data.dtype))
        self.optimizer.step(self.lr, skip)
        self.result = StepResult(cross_entropy / num_targets, norm, skip)

    def _total(self, sums: Sums) -> Tensor:
        return all_reduce(torch.stack((sums.cross_entropy, sums.num_targets)), self.mesh.dp_cp)
