"""Executes a list of instructions: a table from op to handler, and nothing that knows of any schedule."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megacore.mesh.group import Group, Ranges
from megacore.model.inputs import Inputs, Shared
from megacore.model.stage import Loss, Stage
from megacore.parallel.wgrad import WeightGradients, Work
from megacore.pipeline.clock import Mark
from megacore.pipeline.mailbox import Mailbox
from megacore.schedule.instruction import COMPUTE, MESSAGES, RECEIVES, Instruction, Op

AHEAD = 2
"""Computations."""
WHOLE = -1
"""In place of a unit: all of a stage."""
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


def nothing(*ignored: object) -> None:
    """There is nothing to do."""


@dataclass(frozen=True)
class Actions:
    """What a list can ask for besides computing and messages."""

    reduce: Callable[[int, int], None]
    """(stage, unit): sums the gradients of a stage, or of one of its units, over the ranks that hold copies; may still
    be under way when it returns."""
    tied: Callable[[int, int], None]
    """(stage, other rank): sums the gradients of tied weights with the other rank's."""
    optimize: Callable[[Sums], None]
    """Updates the weights."""
    gather: Callable[[int, int], None] = nothing
    """Begins to bring a unit's parameters, which other ranks hold parts of."""
    free: Callable[[int, int], None] = nothing
    """Lets them go."""
    use: Callable[[int, int, bool], None] = nothing
    """Before a stage or unit computes forwards (False) or backwards (True): what it needs is to be in place."""
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around the forward of a stage or unit."""


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
    last = deque([0] * AHEAD, AHEAD)  # where the last computations begin
    computed: tuple[int, ...] = ()
    for place, each in numbered:
        if each.op in RECEIVES:
            moved.insert(last[0], (place, each))
            last = deque((at + 1 for at in last), AHEAD)
            continue
        if each.op in COMPUTE and each[:3] != computed:  # a stage's units are one computation
            last.append(len(moved))
            computed = each[:3]
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
            Op.FORWARD: lambda i: self._forward(i.stage, i.microbatch, i.unit),
            Op.BACKWARD: lambda i: self._backward(i.stage, i.microbatch, i.unit),
            Op.INPUT_GRAD: self._input_grad,
            Op.WEIGHT_GRAD: self._weight_grad,
            Op.PAIR: self._pair,
            Op.REDUCE: lambda i: actions.reduce(i.stage, i.unit),
            Op.GATHER: lambda i: actions.gather(i.stage, i.unit),
            Op.FREE: lambda i: actions.free(i.stage, i.unit),
            Op.TIED: lambda i: actions.tied(i.stage, i.peer),
            Op.OPTIMIZE: lambda i: actions.optimize(self.sums),
        }
        # a microbatch within a stage or unit: its input (None: tokens), and where its graph ends (None: all is frozen)
        self.live: dict[tuple[int, int, int], tuple[Tensor | None, GradientEdge | None]] = {}
        self.put_off: dict[tuple[int, int, int], list[Work]] = {}
        # within a stage that is walked by units: what one gave to the next, and what all need
        self.between: dict[tuple[int, int], Tensor] = {}
        self.shared: dict[tuple[int, int], Shared] = {}
        self.peak_live = 0
        self.logits: Tensor | None = None
        self.do = self._do

    @contextmanager
    def named(self, ranges: Ranges) -> Iterator[None]:
        """Within, everything that is done is a range of its name in a profile."""

        def do(op: Op, instructions: Sequence[Instruction]) -> None:
            with ranges(" ".join(map(str, instructions))):
                self._do(op, instructions)

        before, self.do = self.do, do
        try:
            yield
        finally:
            self.do = before

    def compile(self, instructions: Iterable[Instruction]) -> list[Step]:
        """This rank's list in the form that ``run`` walks."""
        return compile_list(instructions, by_name=self.pp.backend == "gloo")

    def run(
        self,
        steps: Sequence[Step],
        microbatches: Sequence[Inputs],
        loss_weight: Tensor | None = None,
        logits: bool = False,
        marks: Marks | None = None,
    ) -> Sums:
        """Walk a compiled list.

        ``loss_weight`` (scalar, of the loss's dtype) multiplies the loss sums before they are differentiated; a list
        that only forwards needs none. With ``logits`` the last stage ends in those instead of the loss, and they lie in
        ``self.logits``. ``marks`` takes begin and end of every instruction.
        """
        self.microbatches, self.wants_logits = microbatches, logits
        self.loss_weight = torch.ones((), device=self.device) if loss_weight is None else loss_weight
        self.sums, self.logits, self.peak_live = Sums.zeros(self.device), None, 0
        self.mailbox = Mailbox(self.pp, self.num_stages)
        for op, instructions, places in steps:
            if marks is None:
                self.do(op, instructions)
            else:
                self._settle(instructions)  # waiting is not computing
                began = Mark(self.device)
                self.do(op, instructions)
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

    def _forward(self, number: int, microbatch: int, unit: int = WHOLE) -> None:
        """One stage, or one of its units, of which the first takes from and the last gives to other stages."""
        stage, x, at = self.stages[number], None, (number, microbatch)
        self.actions.use(number, unit, False)
        if unit > 0:
            x = self.between.pop(at)
        elif not stage.first:
            x = self.mailbox.take(("activation", number - 1, microbatch))
        if x is not None:
            x.requires_grad_(torch.is_grad_enabled())
        inputs = self.microbatches[microbatch]
        if unit != WHOLE and at not in self.shared:
            self.shared[at] = stage.shared(inputs)
        with self.actions.within():
            if unit == WHOLE:
                out = stage(inputs, x, self.wants_logits)
            else:
                out = stage.unit(unit, inputs, self.shared[at], x, self.wants_logits)
        self._pass_on(out, number, microbatch, unit)
        if torch.is_grad_enabled():
            end = out.objective if isinstance(out, Loss) else out
            # the output itself is not kept: the graph only needs to know where it ended
            self.live[number, microbatch, unit] = x, get_gradient_edge(end) if end.requires_grad else None
            self.peak_live = max(self.peak_live, len({at[:2] for at in self.live}))
        elif unit != WHOLE and unit == stage.num_units - 1:
            self.shared.pop(at, None)

    def _pass_on(self, out: Tensor | Loss, number: int, microbatch: int, unit: int) -> None:
        stage = self.stages[number]
        if isinstance(out, Loss):
            self.sums.add(out)
        elif unit != WHOLE and unit < stage.num_units - 1:
            self.between[number, microbatch] = out.detach()
        elif stage.last:
            self.logits = out
        else:
            self.mailbox.put(("activation", number, microbatch), out.detach())

    def _backward(self, number: int, microbatch: int, unit: int = WHOLE) -> None:
        stage, at = self.stages[number], (number, microbatch)
        self.actions.use(number, unit, True)
        grad = self._gradient(stage, number, microbatch, unit)
        x, end = self.live.pop((*at, unit))
        if end is not None:
            torch.autograd.backward((end,), (grad,))
        if unit <= 0:
            self.shared.pop(at, None)
        if x is None:
            return
        if unit > 0:
            self.between[at] = of_input(x)
        else:
            self.mailbox.put(("gradient", *at), of_input(x))

    def _gradient(self, stage: Stage, number: int, microbatch: int, unit: int) -> Tensor:
        """Of what a stage or unit gave on."""
        if unit != WHOLE and unit < stage.num_units - 1:
            return self.between.pop((number, microbatch))
        if not stage.last:
            return self.mailbox.take(("gradient", number + 1, microbatch))
        return self.loss_weight

    def _input_grad(self, instruction: Instruction) -> None:
        at = instruction.stage, instruction.microbatch, instruction.unit
        with self.wgrad.put_off() as self.put_off[at]:
            self._backward(*at)

    @torch.no_grad()
    def _weight_grad(self, instruction: Instruction) -> None:
        for work in self.put_off.pop((instruction.stage, instruction.microbatch, instruction.unit)):
            work()

    def _pair(self, instruction: Instruction) -> None:
        """Both halves in turn: on one CPU thread there is nothing to overlap, and no GPU has shown a gain yet."""
        self._forward(instruction.stage, instruction.microbatch)
        self._backward(instruction.back_stage, instruction.back_microbatch)


def of_input(x: Tensor) -> Tensor:
    """The gradient that backward left at a stage's or unit's input."""
    assert x.grad is not None, "every output depends on its input"
    return x.grad
