"""Rounding to bf16 by chance: up or down with the odds that make it right on average (Gupta et al. 2015, section 3).

What is rounded is keyed by (seed, name, global element, step), so that it depends neither on where shards are cut nor
on which rank holds a copy.
"""

import math

import torch
from torch import Tensor

from megacore.kernels import counter
from megacore.mesh.group import Group
from megacore.spec import ParamSpec

STEP_BITS = 40
"""Global indices stay below 2^40; steps lie above them."""


class GlobalIndex:
    """Where elements of a local tensor, flattened, stand in the whole parameter, flattened."""

    def __init__(self, spec: ParamSpec, tp: Group, device: torch.device) -> None:
        rows = [torch.arange(piece.start, piece.start + piece.size) for piece in spec.pieces(tp.rank, tp.size)]
        self.rows = torch.cat(rows).to(device) if rows else torch.empty(0, dtype=torch.long, device=device)
        self.size = spec.shape[spec.dim]
        self.inner = math.prod(spec.shape[spec.dim + 1 :])

    def __call__(self, start: int, stop: int) -> Tensor:
        """int64 [stop - start], of local elements ``[start, stop)``."""
        local = torch.arange(start, stop, device=self.rows.device)
        if len(self.rows) == self.size:
            return local
        inner = local % self.inner
        row = local.div(self.inner, rounding_mode="floor")
        outer = row.div(len(self.rows), rounding_mode="floor")
        return (outer * self.size + self.rows[row % len(self.rows)]) * self.inner + inner


def to_bf16(values: Tensor, key: int, index: Tensor, clock: Tensor) -> Tensor:
    """``values`` (finite) in bf16, rounded by chance. index: their global indices, int64; clock: steps, a scalar."""
    bits = values.to(torch.float32).view(torch.int32)
    steps = clock.to(torch.long) << STEP_BITS
    chance = (counter.hash64(key, index + steps) & 0xFFFF).to(torch.int32)
    # the lower half decides how far up it is to the next bf16 number, away from 0; a carry goes there
    return ((bits + chance) & -0x10000).view(torch.float32).to(torch.bfloat16)
