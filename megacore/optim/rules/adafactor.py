"""Adafactor (Shazeer and Stern 2018, algorithms 4 and 5): second moments as a row times a column, no first moment.

Relative steps are made by ``optim.lr_schedule``: the paper's min(0.01, 1/sqrt(t)) is lr = 0.01, inverse_sqrt.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from megacore.optim.factored import clipping, divide_by_root, scale
from megacore.optim.matrixwise import MatrixWise
from megacore.optim.rule import Share
from megacore.optim.taking import put, whole

# Section 9, "Proposed hyperparameters for Adafactor"; weight decay is not part of the paper.
DEFAULTS = MappingProxyType(
    {
        "decay_rate": 0.8,  # at step t, second moments keep 1 - t^-decay_rate of what they were
        "eps": 1e-30,  # the paper's epsilon 1, added to squared gradients
        "eps_scale": 1e-3,  # its epsilon 2: weights whose RMS is smaller take steps as if it were this
        "clip_threshold": 1.0,  # its d: the largest RMS of an update
        "scale_parameter": 1.0,  # 1: steps are relative to the RMS of the weights (section 8); 0: they are not
        "weight_decay": 0.0,
    }
)
STATE = MappingProxyType({"rows": "row", "columns": "column"})


class Adafactor(MatrixWise):
    """Two passes over the ranks a step: sums of rows and columns, then the RMS of each update."""

    def __init__(self, share: Share, settings: Mapping[str, float]) -> None:
        super().__init__(share, settings)
        self.moments = self.new_margins()

    @torch.no_grad()
    def update(self, grads: Sequence[Tensor], lr: float, taken: Tensor) -> None:
        """As ``Rule.update``."""
        self.clock += taken
        matrices, settings, go = self.matrices, self.settings, taken != 0
        updates = [grad.to(self.dtype) for grad in grads]
        weights = (self.weights.read(run, whole(weight), self.dtype) for run, weight in enumerate(self.share.weights))
        squares, sizes = matrices.reduce(
            matrices.margins(update.square() for update in updates),
            matrices.sums(weight.square() for weight in weights),
        )
        squares += settings["eps"] * matrices.lengths
        fresh = self.clock.to(self.dtype) ** -settings["decay_rate"]
        put(go, self.moments, self.moments.lerp(squares, fresh))
        divide_by_root(matrices, updates, self.moments)
        factors = clipping(matrices, updates, settings["clip_threshold"])
        if settings["scale_parameter"]:
            factors *= (sizes / matrices.numels).sqrt_().clamp_(min=settings["eps_scale"])
        scale(matrices, updates, factors)
        for run, update in enumerate(updates):
            self.descend(run, update, lr, go)

    def state(self) -> Mapping[str, Sequence[Tensor]]:
        """As ``Rule.state``."""
        return self.margins_state(self.moments)
