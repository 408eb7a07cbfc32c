"""Executes a list of instructions: a table from op to handler, and nothing that knows of any schedule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megacore.model.inputs import Inputs
from megacore.model.stage import Loss, Stage
from megacore.schedule.instruction import Instruction, Op


@dataclass
class Sums:
    """Sums over the microbatches of one list, as scalars on the device, in float64."""

    cross_entropy: Tensor
    num_targets: Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> "Sums":
        return cls(*(torch.zeros((), dtype=torch.float64, device=device) for _ in range(2)))

    def add(self, loss: Loss) -> None:
        self.cross_entropy += loss.cross_entropy
        self.num_targets += loss.num_targets


class PipelineEngine:
    """Runs the instructions of one pipeline rank.

    ``stages`` maps global stage numbers to the modules this rank holds; ``reduce(stage)`` sums a stage's gradients over
    its copies; ``optimize(sums)`` updates the weights.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        device: torch.device,
        reduce: Callable[[int], None],
        optimize: Callable[[Sums], None],
    ) -> None:
        self.stages, self.device, self.reduce, self.optimize = stages, device, reduce, optimize
        self.handlers = {
            Op.FORWARD: self._forward,
            Op.BACKWARD: self._backward,
            Op.REDUCE: self._reduce,
            Op.OPTIMIZE: self._optimize,
        }
        self.live: dict[tuple[int, int], Tensor] = {}

    def run(
        self, instructions: Sequence[Instruction], microbatches: Sequence[Inputs], loss_weight: float = 1.0
    ) -> Sums:
        """One step. ``loss_weight`` multiplies the loss sums before they are differentiated."""
        self.microbatches, self.loss_weight = microbatches, loss_weight
        self.sums = Sums.zeros(self.device)
        for instruction in instructions:
            self.handlers[instruction.op](instruction)
        return self.sums

    def _forward(self, instruction: Instruction) -> None:
        loss = self.stages[instruction.stage](self.microbatches[instruction.microbatch])
        self.sums.add(loss)
        if loss.objective.requires_grad:
            self.live[instruction.stage, instruction.microbatch] = loss.objective

    def _backward(self, instruction: Instruction) -> None:
        objective = self.live.pop((instruction.stage, instruction.microbatch))
        objective.backward(torch.full_like(objective, self.loss_weight))

    def _reduce(self, instruction: Instruction) -> None:
        self.reduce(instruction.stage)

    def _optimize(self, instruction: Instruction) -> None:
        self.optimize(self.sums)
