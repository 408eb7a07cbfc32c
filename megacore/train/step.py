"""One optimizer step and one evaluation: what happens around the schedule's instructions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megacore.mesh.collectives import all_reduce
from megacore.mesh.messages import swap
from megacore.model.inputs import Inputs
from megacore.model.stage import TIED, Stage
from megacore.optim.clipping import Clip
from megacore.optim.loss_scale import LossScale
from megacore.optim.rule import Rule
from megacore.optim.statistics import Statistics, Watch
from megacore.parallel.fp8 import Fp8, SignalToNoise
from megacore.parallel.transformer_engine import TransformerEngine
from megacore.parallel.wgrad import WeightGradients
from megacore.pipeline.engine import Actions, Marks, PipelineEngine, Step, Sums, nothing
from megacore.schedule.generators.generate import forward_only
from megacore.schedule.instruction import Instruction
from megacore.schedule.lower import lower
from megacore.schedule.schedule import Schedule
from megacore.schedule.units import by_unit, with_early_sums
from megacore.sharding.storage import Storage
from megacore.spec import ModelSpec

TIED_TAG = 1 << 29
"""The name of the message with tied weights' gradients: above those of activations."""


@dataclass(frozen=True)
class StepResult:
    """Scalars on the device (float64, equal on all ranks): read them when the host has time."""

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    asked: Tensor
    """[3] How many ranks wish the run to stop, to save, to be profiled (``train.wishes``)."""
    statistics: Statistics | None = None
    """Where they are due."""
    signal_to_noise: SignalToNoise | None = None
    """Of products in FP8, with the statistics."""

    def figures(self) -> dict[str, Any] | None:
        """The statistics as metrics.jsonl has them, where they are due; waits for the device."""
        if self.statistics is None:
            return None
        decibels = {} if self.signal_to_noise is None else {"fp8_snr_db": self.signal_to_noise.decibels()}
        return {**self.statistics.record(), **decibels}


class Trainer:
    """Takes a rank's microbatches through forward, backward, gradient sums, clipping and update.

    The loss is a global sum over a global count. Each microbatch's sum is differentiated with the weight
    loss scale / nominal targets (batch x length), which is known beforehand, and the gradients are scaled by
    nominal / (counted x loss scale) when the count is: exactly 1 where every token is a target and nothing is scaled.
    """

    def __init__(
        self,
        spec: ModelSpec,
        stages: Mapping[int, Stage],
        home: Sequence[int],
        plan: Callable[[int], Schedule],
        storage: Storage,
        wgrad: WeightGradients,
        clip: Clip,
        loss_scale: LossScale,
        rule: Rule,
        watch: Watch | None = None,
        fp8: Fp8 | TransformerEngine | None = None,
    ) -> None:
        """``home`` is the pipeline rank of every stage, ``plan`` gives the schedule of so many microbatches; ``watch``
        makes the statistics of steps that ask for them; ``fp8`` are the stages' layers that multiply in FP8."""
        self.spec, self.stages, self.home, self.plan, self.storage = spec, stages, tuple(home), plan, storage
        self.clip, self.loss_scale, self.rule, self.watch, self.fp8 = clip, loss_scale, rule, watch, fp8
        if fp8 is not None:
            storage.call_on_change(fp8.renew, fp8.forget)
        self.mesh = mesh = storage.mesh
        no_wishes = torch.zeros(3, dtype=torch.float64, device=mesh.device)
        self.wishes: Callable[[], Tensor] = lambda: no_wishes
        """[3] What this rank asks of all: to stop, save, profile; called at the end of each step (``train.wishes``)."""
        self.summed: Callable[[Sequence[Tensor]], None] = nothing
        """Is shown this rank's gradients when they are summed, before they are clipped."""
        actions = Actions(
            reduce=lambda stage, unit: storage.reduce((stage, unit)),
            tied=self._sum_tied,
            optimize=self._optimize,
            gather=lambda stage, unit: storage.gather((stage, unit)),
            free=lambda stage, unit: storage.free((stage, unit)),
            use=self._use if storage.policy.by_unit or storage.shards.size > 1 else nothing,
            within=nullcontext if fp8 is None else fp8.within,
        )
        self.engine = PipelineEngine(stages, len(self.home), mesh.pp, wgrad, mesh.device, actions)
        self._training: dict[int, list[Step]] = {}
        self._timed: dict[int, list[Step]] = {}
        self._forward: dict[int, list[Step]] = {}

    def step(
        self,
        microbatches: Sequence[Inputs],
        num_nominal: int,
        lr: float,
        marks: Marks | None = None,
        watched: bool = False,
    ) -> StepResult:
        """Train on this rank's part of a batch of ``num_nominal`` tokens in all; ``marks`` as the engine takes them,
        ``watched``: make statistics of this step."""
        self.num_nominal, self.lr, self.watched = num_nominal, lr, watched
        self.storage.begin()
        if self.fp8 is not None:
            self.fp8.begin(measures=watched)
        # what is timed is the list as it was planned
        known = self._training if marks is None else self._timed
        steps = self._compiled(known, self.plan, len(microbatches))
        weight = self.loss_scale.scale.to(torch.float64) / num_nominal
        self.engine.run(steps, microbatches, weight.to(self._loss_dtype), marks=marks)
        return self.result

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Inputs]) -> Tensor:
        """[sum of cross-entropy, number of targets, wishes to stop, save, profile] of this rank's and all other ranks'
        part, float64 on the device."""
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

    @property
    def _loss_dtype(self) -> torch.dtype:
        return torch.promote_types(self.storage.numbers.params, torch.float32)

    def _forward_steps(self, num_microbatches: int) -> list[Step]:
        return self._compiled(self._forward, lambda n: lower(forward_only(self.home, n)), num_microbatches)

    def _compiled(self, known: dict[int, list[Step]], plan: Callable[[int], Schedule], number: int) -> list[Step]:
        if number not in known:
            listed: Iterable[Instruction] = plan(number).ranks[self.mesh.pp.rank]
            storage, policy = self.storage, self.storage.policy
            num_units = {stage: module.num_units for stage, module in self.stages.items()}
            if policy.by_unit:
                listed = by_unit(listed, num_units, policy.params)
            elif self.mesh.dp_cp.size > 1 and known is not self._timed:
                early = storage.summed_early()
                some = {stage: number for stage, number in num_units.items() if stage in early}
                listed = with_early_sums(listed, some, late_weights=storage.shards.size > 1)
            known[number] = self.engine.compile(listed)
        return known[number]

    def _use(self, stage: int, unit: int, backward: bool) -> None:
        self.storage.use((stage, unit), backward)

    def _sum_tied(self, stage: int, peer: int) -> None:
        """Both copies of a tied matrix get the sum of their gradients, over dp already summed; each rank of what it
        owns, which is the same part on both."""
        self.storage.settle()
        for run, grad in zip(self.storage.runs, self.storage.own_grads):
            if run.name == TIED:
                grad.add_(swap(grad, peer, TIED_TAG, self.mesh.pp))

    @torch.no_grad()
    def _optimize(self, sums: Sums) -> None:
        storage, grads = self.storage, self.storage.own_grads
        storage.finish()
        self.summed(grads)
        total = self._total(sums)
        cross_entropy, num_targets = total[:2]
        if self.watch is not None and self.watched:
            self.watch.before(grads, storage.values())
        clipped = self.clip(grads, self.num_nominal / num_targets / self.loss_scale.scale.to(torch.float64))
        skipped = 1 - clipped.taken
        self.loss_scale.update(skipped)
        self.rule.update(grads, self.lr, clipped.taken)
        noise = None if self.fp8 is None else self.fp8.finish()
        storage.publish(copied=self.rule.writes_copies)
        statistics = None
        if self.watch is not None:
            self.watch.clipped(clipped)
            statistics = self.watch.after(storage.values(), clipped) if self.watched else None
        self.result = StepResult(cross_entropy / num_targets, clipped.norm, skipped, total[2:], statistics, noise)

    def _total(self, sums: Sums) -> Tensor:
        total = torch.cat((torch.stack((sums.cross_entropy, sums.num_targets)), self.wishes()))
        # ranks without the last stage add zeros; those of a tp group hold equal sums, but heard different things
        total = all_reduce(all_reduce(total, self.mesh.dp_cp), self.mesh.pp)
        return torch.cat((total[:2], all_reduce(total[2:], self.mesh.tp)))
