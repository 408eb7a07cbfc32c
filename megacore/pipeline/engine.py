"""Executes a list of instructions: a table from op to handler, and nothing that knows of any schedule."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megacore.mesh.group import Group
from megacore.model.inputs import Inputs
from megacore.model.stage import Loss, Stage
from megacore.parallel.wgrad import WeightGradients, Work
from megacore.pipeline.clock import Mark
from megacore.pipeline.mailbox import Mailbox
from megacore.schedule.instruction import COMPUTE, MESSAGES, RECEIVES, Instruction, Op

AHEAD = 2
"""Computations."""
Marks = dict[int, tuple[Mark, Mark]]
"""Begin and end of an instruction, by its place in the list."""


class Step(NamedTuple):
    """What is done at once: one instruction, or messages that are posted together; and their places in the list."""

    op: Op
    instructions: tuple[Instruction, ...]
    places: tuple[int, ...]


@dataclass
class Sums:
    """Sums over the microbatches of one list: scalars on the device, float64; 0 on ranks without the last stage."""

    cross_entropy: Tensor
    num_targets: Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> "Sums":
        return cls(*(torch.zeros((), dtype=torch.float64, device=device) for _ in range(2)))

    def add(self, loss: Loss) -> None:
        self.cross_entropy += loss.cross_entropy
        self.num_targets += loss.num_targets


@dataclass(frozen=True)
class Actions:
    """What a list can ask for besides computing and messages."""

    reduce: Callable[[int], None]
    """Sums a stage's gradients over the ranks that hold copies of it; may still be under way when it returns."""
    tied: Callable[[int, int], None]
    """(stage, other rank): sums the gradients of tied weights with the other rank's."""
    optimize: Callable[[Sums], None]
    """Updates the weights."""


def compile_list(instructions: Iterable[Instruction], by_name: bool) -> list[Step]:
    """The list as the engine walks it: messages that follow each other are posted together.

    Where the backend matches messages ``by_name``, receives are posted ``AHEAD`` computations early: what arrives while
    a rank computes then finds its place. (One that matches by order needs them where the list was proved to run.)
    """
    numbered = list(enumerate(instructions))
    if by_name:
        numbered = _receives_ahead(numbered)
    steps: list[Step] = []
    for is_message, run in groupby(numbered, lambda each: each[1].op in MESSAGES):
        if is_message:
            places, messages = zip(*run)
            steps.append(Step(Op.SEND_ACTIVATION, messages, places))
        else:
            steps += [Step(each.op, (each,), (place,)) for place, each in run]
    return steps


def _receives_ahead(numbered: list[tuple[int, Instruction]]) -> list[tuple[int, Instruction]]:
    moved: list[tuple[int, Instruction]] = []
    last = deque([0] * AHEAD, AHEAD)  # where the last computations stand
    for place, each in numbered:
        if each.op in RECEIVES:
            moved.insert(last[0], (place, each))
            last = deque((at + 1 for at in last), AHEAD)
            continue
        if each.op in COMPUTE:
            last.append(len(moved))
        moved.append((place, each))
    return moved


class PipelineEngine:
    """Runs the instructions of one pipeline rank.

    ``stages`` maps global stage numbers to the modules this rank holds, of ``num_stages`` in all; ``wgrad`` is what
    their layers give weight gradients to.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        num_stages: int,
        pp: Group,
        wgrad: WeightGradients,
        device: torch.device,
        actions: Actions,
    ) -> None:
        self.stages, self.num_stages, self.pp, self.device = stages, num_stages, pp, device
        self.wgrad, self.actions = wgrad, actions
        self.handlers: Mapping[Op, Callable[[Instruction], None]] = {
            Op.FORWARD: lambda i: self._forward(i.stage, i.microbatch),
            Op.BACKWARD: lambda i: self._backward(i.stage, i.microbatch),
            Op.INPUT_GRAD: self._input_grad,
            Op.WEIGHT_GRAD: self._weight_grad,
            Op.PAIR: self._pair,
            Op.REDUCE: lambda i: actions.reduce(i.stage),
            Op.TIED: lambda i: actions.tied(i.stage, i.peer),
            Op.OPTIMIZE: lambda i: actions.optimize(self.sums),
        }
        # a microbatch within a stage: its input (None: tokens) and where its graph ends
        self.live: dict[tuple[int, int], tuple[Tensor | None, GradientEdge]] = {}
        self.put_off: dict[tuple[int, int], list[Work]] = {}
        self.peak_live = 0

    def compile(self, instructions: Iterable[Instruction]) -> list[Step]:
        """This rank's list in the form that ``run`` walks."""
        return compile_list(instructions, by_name=self.pp.backend == "gloo")

    def run(
        self,
        steps: Sequence[Step],
        microbatches: Sequence[Inputs],
        loss_weight: float = 1.0,
        logits: bool = False,
        marks: Marks | None = None,
    ) -> Sums:
        """Walk a compiled list.

        ``loss_weight`` multiplies the loss sums before they are differentiated. With ``logits`` the last stage ends in
        those instead of the loss, and they lie in ``self.logits``. ``marks`` takes begin and end of every instruction.
        """
        self.microbatches, self.loss_weight, self.wants_logits = microbatches, loss_weight, logits
        self.sums, self.logits, self.peak_live = Sums.zeros(self.device), None, 0
        self.mailbox = Mailbox(self.pp, self.num_stages)
        for op, instructions, places in steps:
            if marks is None:
                self._do(op, instructions)
            else:
                self._settle(instructions)  # waiting is not computing
                began = Mark(self.device)
                self._do(op, instructions)
                marks.update(dict.fromkeys(places, (began, Mark(self.device))))
        self.mailbox.close()
        assert not self.live and not self.put_off, (list(self.live), list(self.put_off))
        return self.sums

    def _do(self, op: Op, instructions: Sequence[Instruction]) -> None:
        if op is Op.SEND_ACTIVATION:
            self.mailbox.post(instructions, self._buffer)
        else:
            self.handlers[op](instructions[0])

    def _buffer(self, instruction: Instruction) -> Tensor:
        """What a message between two stages is received into."""
        stage = next(iter(self.stages.values()))
        shape = stage.boundary_shape(self.microbatches[instruction.microbatch])
        return torch.empty(shape, dtype=stage.dtype, device=self.device)

    def _settle(self, instructions: Sequence[Instruction]) -> None:
        """Wait for what an instruction is about to take."""
        op, stage, microbatch = instructions[0][:3]
        if op in (Op.FORWARD, Op.PAIR):
            self.mailbox.settle(("activation", stage - 1, microbatch))
        if op in (Op.BACKWARD, Op.INPUT_GRAD):
            self.mailbox.settle(("gradient", stage + 1, microbatch))
        if op is Op.PAIR:
            self.mailbox.settle(("gradient", instructions[0].back_stage + 1, instructions[0].back_microbatch))

    def _forward(self, number: int, microbatch: int) -> None:
        stage, x = self.stages[number], None
        if not stage.first:
            x = self.mailbox.take(("activation", number - 1, microbatch)).requires_grad_(torch.is_grad_enabled())
        out = stage(self.microbatches[microbatch], x, self.wants_logits)
        if stage.last and self.wants_logits:
            self.logits = out
            return
        if isinstance(out, Loss):
            self.sums.add(out)
            out = out.objective
        else:
            self.mailbox.put(("activation", number, microbatch), out.detach())
        if out.requires_grad:
            # the output itself is not kept: the graph only needs to know where it ended
            self.live[number, microbatch] = x, get_gradient_edge(out)
            self.peak_live = max(self.peak_live, len(self.live))

    def _backward(self, number: int, microbatch: int) -> None:
        stage = self.stages[number]
        if stage.last:
            grad = torch.full((), self.loss_weight, dtype=stage.dtype, device=self.device)
        else:
            grad = self.mailbox.take(("gradient", number + 1, microbatch))
        x, end = self.live.pop((number, microbatch))
        torch.autograd.backward((end,), (grad,))
        if x is not None:
            assert x.grad is not None, "every stage's output depends on its input"
            self.mailbox.put(("gradient", number, microbatch), x.grad)

    def _input_grad(self, instruction: Instruction) -> None:
        at = instruction.stage, instruction.microbatch
        with self.wgrad.put_off() as self.put_off[at]:
            self._backward(*at)

    @torch.no_grad()
    def _weight_grad(self, instruction: Instruction) -> None:
        for work in self.put_off.pop((instruction.stage, instruction.microbatch)):
            work()

    def _pair(self, instruction: Instruction) -> None:
        """Both halves in turn: on one CPU thread there is nothing to overlap, and no GPU has shown a gain yet."""
        self._forward(instruction.stage, instruction.microbatch)
        self._backward(instruction.back_stage, instruction.back_microbatch)
