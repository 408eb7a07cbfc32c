"""Activations that are not kept for backward but made again when it comes (Chen et al. 2016).

`none` keeps everything; `selective` makes the core of attention again, which is large and cheap (Korthikanti et al.
2022, section 5); `full` keeps nothing of a block but its input. Everything random is a function of indices, so the
second run gives the same bits as the first, and gradients do not depend on the choice.

``torch.utils.checkpoint`` does the same. Here the second run may be another function than the first: it leaves out
what it only would compute to throw away (a block's last matrix product and its sum over tp).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Save = Callable[[Tensor], Any]
"""Takes a tensor that a layer which is left out would have saved."""


def recomputed(run: Callable[[Tensor], Tensor], again: Callable[[Tensor, Save], object], x: Tensor) -> Tensor:
    """``run(x)``, of which only ``x`` is kept where a backward follows.

    ``again(x, save)`` must save for backward what ``run(x)`` does, in the same order; ``save`` stands for layers that
    it leaves out. It runs in backward, when the first saved tensor is wanted, so its collectives come in an order that
    is the same on all ranks.
    """
    if not torch.is_grad_enabled():
        return run(x)
    replay = _Replay(again, x)
    with saved_tensors_hooks(replay.pack, replay.unpack):
        return run(x)


class _Replay:
    """The tensors that one run saves: their numbers and shapes, until they are made again."""

    def __init__(self, again: Callable[[Tensor, Save], object], x: Tensor) -> None:
        self.again, self.x, self.wants_grad = again, x.detach(), x.requires_grad
        self.shapes: list[torch.Size] = []
        self.made: list[Tensor | None] = []

    def pack(self, tensor: Tensor) -> int:
        """Forget a tensor; what is left is its number."""
        self.shapes.append(tensor.shape)
        return len(self.shapes) - 1

    def unpack(self, number: int) -> Tensor:
        """The tensor of this number, once: nothing here outlives its use."""
        if not self.made:
            self._make()
        tensor, self.made[number] = self.made[number], None
        assert tensor is not None, f"saved tensor {number} is wanted twice"
        return tensor

    def _make(self) -> None:
        def save(tensor: Tensor) -> None:
            self.made.append(tensor.detach())

        with torch.enable_grad(), saved_tensors_hooks(save, _never):
            self.again(self.x.requires_grad_(self.wants_grad), save)
        made = [tensor.shape for tensor in self.made if tensor is not None]
        assert made == self.shapes, f"saved at first {self.shapes}, then {made}"


def _never(_: object) -> Tensor:
    raise AssertionError("the second run's own graph is never walked")
