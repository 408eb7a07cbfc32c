"""One optimizer step and one evaluation: what happens around the schedule's instructions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megacore.mesh.collectives import all_reduce
from megacore.mesh.mesh import ParallelMesh
from megacore.mesh.messages import swap
from megacore.model.inputs import Inputs
from megacore.model.stage import TIED, Stage
from megacore.optim.groups import Optimizer
from megacore.optim.norm import GlobalNorm
from megacore.optim.statistics import Statistics
from megacore.parallel.wgrad import WeightGradients
from megacore.pipeline.engine import Actions, Marks, PipelineEngine, Step, Sums
from megacore.schedule.generators.generate import forward_only
from megacore.schedule.lower import lower
from megacore.schedule.schedule import Schedule
from megacore.sharding.flat import FlatParameters
from megacore.sharding.reduce import GradientReducer
from megacore.spec import ModelSpec

CLIP_EPS = 1e-6
"""Added to the norm before dividing, as torch's clip_grad_norm_ does."""
TIED_TAG = 1 << 29
"""The name of the message with tied weights' gradients: above those of activations."""


@dataclass(frozen=True)
class StepResult:
    """Scalars on the device (float64, equal on all ranks): read them when the host has time."""

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    statistics: Statistics | None = None
    """Where they are due."""


class Trainer:
    """Takes a rank's microbatches through forward, backward, gradient sums, clipping and update.

    The loss is a global sum over a global count. Each microbatch's sum is differentiated with the weight
    1 / nominal targets (batch x length), which is known beforehand, and the gradients are scaled by nominal / counted
    when the count is: exactly 1 where every token is a target.
    """

    def __init__(
        self,
        spec: ModelSpec,
        stages: Mapping[int, Stage],
        home: Sequence[int],
        plan: Callable[[int], Schedule],
        flat: FlatParameters,
        mesh: ParallelMesh,
        wgrad: WeightGradients,
        reducer: GradientReducer,
        norm: GlobalNorm,
        optimizer: Optimizer,
        clip_grad: float,
    ) -> None:
        """``home`` is the pipeline rank of every stage, ``plan`` gives the schedule of so many microbatches."""
        self.spec, self.home, self.flat, self.mesh, self.norm, self.optimizer = (
            spec,
            tuple(home),
            flat,
            mesh,
            norm,
            optimizer,
        )
        self.plan, self.reducer, self.clip_grad = plan, reducer, clip_grad
        actions = Actions(reducer.start, self._sum_tied, self._optimize)
        self.engine = PipelineEngine(stages, len(self.home), mesh.pp, wgrad, mesh.device, actions)
        self._training: dict[int, list[Step]] = {}
        self._forward: dict[int, list[Step]] = {}

    def step(
        self,
        microbatches: Sequence[Inputs],
        num_nominal: int,
        lr: float,
        marks: Marks | None = None,
    ) -> StepResult:
        """Train on this rank's part of a batch of ``num_nominal`` tokens in all; ``marks`` as the engine takes them."""
        self.num_nominal, self.lr = num_nominal, lr
        self.flat.grads.data.zero_()
        steps = self._compiled(self._training, self.plan, len(microbatches))
        self.engine.run(steps, microbatches, 1.0 / num_nominal, marks=marks)
        return self.result

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Inputs]) -> Tensor:
        """[sum of cross-entropy, number of targets] of this rank's and all other ranks' part, float64 on the device."""
        return self._total(self.engine.run(self._forward_steps(len(microbatches)), microbatches))

    @property
    def vocab_size(self) -> int:
        """Rows of the output matrix, over all ranks."""
        return self.spec.config.vocab_size

    @torch.no_grad()
    def logits(self, inputs: Inputs) -> Tensor | None:
        """This rank's part of the vocabulary [t, v] on ranks that hold the last stage, None on the others."""
        self.engine.run(self._forward_steps(1), [inputs], logits=True)
        return self.engine.logits

    def _forward_steps(self, num_microbatches: int) -> list[Step]:
        return self._compiled(self._forward, lambda n: lower(forward_only(self.home, n)), num_microbatches)

    def _compiled(self, known: dict[int, list[Step]], plan: Callable[[int], Schedule], number: int) -> list[Step]:
        if number not in known:
            known[number] = self.engine.compile(plan(number).ranks[self.mesh.pp.rank])
        return known[number]

    def _sum_tied(self, stage: int, peer: int) -> None:
        """Both copies of a tied matrix get the sum of their gradients, over dp already summed."""
        self.reducer.finish()
        view = self.flat.grads.views()[TIED]
        view.add_(swap(view, peer, TIED_TAG, self.mesh.pp))

    @torch.no_grad()
    def _optimize(self, sums: Sums) -> None:
        self.reducer.finish()
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
        total = all_reduce(torch.stack((sums.cross_entropy, sums.num_targets)), self.mesh.dp_cp)
        return all_reduce(total, self.mesh.pp)  # the ranks without the last stage add zeros
