"""How operands of matrix products are scaled: the recipes.

| | input x | weight w | gradient g | scale |
|---|---|---|---|---|
| current | E4M3 | E4M3 | E5M2 | one per tensor, of its largest element |
| delayed | E4M3 | E4M3 | E5M2 | one per tensor, of the largest element of the last steps |
| block | E4M3, 1 x 128 | E4M3, 128 x 128 | E4M3, 1 x 128 | one per block; blocks lie along what is summed over |

"Its largest element" is that of the part of a tensor which a rank holds: where tp splits it, ranks scale alone and
nothing travels. As scales are powers of two, results depend on tp by no more than what `formats` says. Delayed scales
come from all ranks' largest elements, so they are the same everywhere.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from megacore.kernels import reference
from megacore.kernels.fp8.formats import (
    E4M3,
    E5M2,
    ROW_BLOCK,
    SQUARE_BLOCK,
    Format,
    Scaled,
    amax_of,
    quantise_blocks,
    scale_of,
)


class Role(IntEnum):
    """What an operand is."""

    INPUT = 0
    WEIGHT = 1
    GRADIENT = 2


def format_of(role: Role) -> Format:
    """The format of tensors that have one scale."""
    return E5M2 if role is Role.GRADIENT else E4M3


Quantise = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""As ``kernels.reference.quantise``."""


def quantised(kernel: Quantise, x: Tensor, scale: Tensor, role: Role) -> Scaled:
    """A matrix with one scale, a float32 scalar. (What a kernel says of the largest element is known already, since
    the scale may depend on it.)"""
    return Scaled(kernel(x, scale, role is Role.GRADIENT)[0].contiguous(), 1 / scale)


class Recipe(Protocol):
    """Brings operands of layer number ``layer`` into FP8: x [m, k] itself (``rows``) or transposed (``columns``).
    Where a tensor has ``one_scale``, both have the same codes."""

    one_scale: bool

    def rows(self, x: Tensor, role: Role, layer: int) -> Scaled: ...

    def columns(self, x: Tensor, role: Role, layer: int) -> Scaled: ...


class Current:
    """One scale per tensor, of the tensor itself; ``kernel`` makes the codes."""

    one_scale = True

    def __init__(self, kernel: Quantise = reference.quantise) -> None:
        self.kernel = kernel

    def rows(self, x: Tensor, role: Role, layer: int) -> Scaled:
        """[m, k]."""
        return quantised(self.kernel, x, scale_of(amax_of(x), format_of(role)), role)

    def columns(self, x: Tensor, role: Role, layer: int) -> Scaled:
        """[k, m]: the very same numbers."""
        return self.rows(x, role, layer).t()

    def scales_of_weights(self, layers: Tensor, largest: Tensor) -> Tensor:
        """What ``rows`` takes for the weights of ``layers`` [n], of which only the largest elements are known."""
        return scale_of(largest, E4M3)


class Blocks:
    """One scale per block; activations and gradients have blocks along what is summed over, so each of the two
    products that they are in needs codes of its own."""

    one_scale = False

    def rows(self, x: Tensor, role: Role, layer: int) -> Scaled:
        """[m, k]."""
        return quantise_blocks(x, E4M3, SQUARE_BLOCK if role is Role.WEIGHT else ROW_BLOCK)

    def columns(self, x: Tensor, role: Role, layer: int) -> Scaled:
        """[k, m]."""
        return quantise_blocks(x.t(), E4M3, SQUARE_BLOCK if role is Role.WEIGHT else ROW_BLOCK)


class Delayed:
    """One scale per tensor, of the largest element in the steps before; none is known at first, and then it is the
    tensor's own.

    Within a step nothing changes: microbatches, recomputation and put-off weight gradients all meet the same scales.
    ``history`` [layer, step, role], the newest step first, is that of the whole model on every rank: float32, 0 where
    nothing is known. ``seen`` [layer, role] is what this step adds to it. ``kernel`` makes the codes.
    """

    one_scale = True

    def __init__(
        self,
        num_layers: int,
        length: int,
        margin: int,
        device: torch.device,
        kernel: Quantise = reference.quantise,
    ) -> None:
        self.margin, self.kernel = margin, kernel
        self.history = torch.zeros(num_layers, length, len(Role), device=device)
        self.seen = torch.zeros(num_layers, len(Role), device=device)
        self.records = False
        """Whether activations and gradients count, as they do in training. Weights always do."""
        self.renew()

    def rows(self, x: Tensor, role: Role, layer: int) -> Scaled:
        """[m, k]."""
        amax = amax_of(x)
        if self.records or role is Role.WEIGHT:
            seen = self.seen[layer, role]
            torch.maximum(seen, amax, out=seen)
        known = self.known[layer, role]
        scale = scale_of(torch.where(known > 0, known, amax), format_of(role), self.margin)
        return quantised(self.kernel, x, scale, role)

    def columns(self, x: Tensor, role: Role, layer: int) -> Scaled:
        """[k, m]: the very same numbers."""
        return self.rows(x, role, layer).t()

    def scales_of_weights(self, layers: Tensor, largest: Tensor) -> Tensor:
        """What ``rows`` takes for the weights of ``layers`` [n], of which only the largest elements are known."""
        self.seen[layers, Role.WEIGHT] = torch.maximum(self.seen[layers, Role.WEIGHT], largest)
        known = self.known[layers, Role.WEIGHT]
        return scale_of(torch.where(known > 0, known, largest), E4M3, self.margin)

    def advance(self, over_ranks: Callable[[Tensor], Tensor]) -> None:
        """At the end of a step what all ranks have seen becomes history; ``over_ranks`` takes the largest of each
        element of a tensor over all of them. What is not finite, in a step that will be skipped, is no history."""
        largest = over_ranks(torch.where(self.seen.isfinite(), self.seen, 0.0))
        self.history.copy_(self.history.roll(1, 1))
        self.history[:, 0] = largest

    def renew(self) -> None:
        """There are new weights, or another history."""
        self.seen.zero_()
        self.known = self.history.amax(1)
