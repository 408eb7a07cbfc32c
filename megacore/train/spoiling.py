"""Memory that fails on purpose (``train.failpoints``): one element of what a rank holds becomes another number."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megacore.train.failpoints import IN_MEMORY, Failpoints, Fault
from megacore.train.replicas import WORDS, moments_of, numbers_of
from megacore.train.step import Trainer

MANTISSA = MappingProxyType({torch.float64: 52, torch.float32: 23, torch.bfloat16: 7, torch.float16: 10})
"""Bits below the exponent: the next one doubles or halves a number."""


class Spoiler:
    """Spoils one rank's memory where and when that was asked for."""

    def __init__(self, faults: Sequence[Fault], trainer: Trainer) -> None:
        self.faults, self.trainer, self.step = tuple(faults), trainer, 0
        self.waiting: set[Fault] = set()
        """Those of this step that have not come about."""

    def begin(self, step: int) -> None:
        """A step begins."""
        self.step, self.waiting = step, {fault for fault in self.faults if fault.step in (None, step)}
        trainer, storage = self.trainer, self.trainer.storage
        storage.arrive()
        there: Mapping[str, Callable[[], Sequence[Tensor]]] = {
            "weight": lambda: storage.weights,
            "moment": lambda: list(moments_of(trainer).values()),
            "number": lambda: [trainer.rule.clock, *numbers_of(trainer).values()],
        }
        for point, tensors in there.items():
            for fault in self.due(point):
                spoil(of_number(tensors(), fault), fault.action)

    def summed(self, grads: Sequence[Tensor]) -> None:
        """Gradients are summed."""
        for fault in self.due("gradient"):
            spoil(of_number(grads, fault), fault.action)

    def gives(self, block: int, x_th: Tensor) -> Tensor:
        """What a block (from 1) gives, spoilt or not."""
        for fault in self.due("activation", block):
            x_th = x_th.clone()
            with torch.no_grad():
                spoil(x_th, fault.action)
        return x_th

    def due(self, point: str, count: int = 0) -> list[Fault]:
        """The faults of a point, and of one block, whose time has come; each once a step."""
        found = [fault for fault in self.waiting if fault.point == point and count in (0, fault.count)]
        self.waiting.difference_update(found)
        return found


def arm(failpoints: Failpoints, trainer: Trainer) -> None:
    """Let memory fail as ``failpoints`` say; nothing is changed where they do not."""
    faults = [fault for fault in failpoints.faults if fault.point in IN_MEMORY]
    if not faults:
        return
    spoiler = Spoiler(faults, trainer)
    failpoints.begun, trainer.summed = spoiler.begin, spoiler.summed
    blocks = chain.from_iterable(stage.blocks for stage in trainer.stages.values())

    def hook(number: int) -> Callable[..., Tensor]:
        def spoilt(block: Any, given: Any, x_th: Tensor) -> Tensor:
            return spoiler.gives(number, x_th)

        return spoilt

    for number, block in enumerate(blocks, 1):
        block.register_forward_hook(hook(number))


def of_number(tensors: Sequence[Tensor], fault: Fault) -> Tensor:
    """The tensor that a fault means. Raises ValueError where there are not so many."""
    there = [tensor for tensor in tensors if tensor.numel()]
    if fault.count > len(there):
        raise ValueError(
            f"MEGACORE_FAIL: {fault.point}#{fault.count}, but this rank has {len(there)} of them; name a smaller number"
        )
    return there[fault.count - 1]


def spoil(tensor: Tensor, action: str) -> None:
    """Change the element that is largest: the lowest bit of its exponent (of an integer: its lowest bit), or all of it.
    ``tensor`` must be contiguous."""
    flat = tensor.detach().view(-1)
    place = int(flat.abs().argmax())
    if action == "bitflip":
        words = flat.view(WORDS[flat.element_size()])
        words[place] ^= 1 << MANTISSA.get(flat.dtype, 0)
    else:
        flat[place] = float(action)
