"""CAME (Luo et al. 2023, algorithm 2): Adafactor's updates, averaged, and smaller where they disagree with the average.

How far an update is off its average is kept as a row times a column, too. Vectors, of which the paper does not speak,
do without that, as in its authors' implementation.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from megacore.optim.factored import clipping, divide_by_root, scale
from megacore.optim.matrixwise import MatrixWise
from megacore.optim.moments import make_moment
from megacore.optim.rule import Share
from megacore.optim.taking import put, whole

# Section 4 (experiment setup); weight decay as the authors' implementation suggests.
DEFAULTS = MappingProxyType(
    {
        "beta1": 0.9,  # of the average update
        "beta2": 0.999,  # of squared gradients
        "beta3": 0.9999,  # of squared deviations from the average
        "eps": 1e-30,  # the paper's epsilon 1, added to squared gradients
        "eps_deviation": 1e-16,  # its epsilon 2, added to squared deviations
        "clip_threshold": 1.0,  # its d: the largest RMS of an update
        "weight_decay": 0.01,
    }
)
STATE = MappingProxyType(
    {"first": "moment", "rows": "row", "columns": "column", "deviation_rows": "row", "deviation_columns": "column"}
)


class Came(MatrixWise):
    """Three passes over the ranks a step: Adafactor's two, and sums of rows and columns of the deviations."""

    def __init__(self, share: Share, settings: Mapping[str, float]) -> None:
        super().__init__(share, settings)
        self.first = make_moment(share, "first", self.clock)
        self.moments = self.new_margins()
        self.deviations = self.new_margins()

    @torch.no_grad()
    def update(self, grads: Sequence[Tensor], lr: float, taken: Tensor) -> None:
        """As ``Rule.update``."""
        self.clock += taken
        matrices, settings, go = self.matrices, self.settings, taken != 0
        updates = [grad.to(self.dtype) for grad in grads]
        self._average_squares(self.moments, updates, "beta2", "eps", go)
        divide_by_root(matrices, updates, self.moments)
        scale(matrices, updates, clipping(matrices, updates, settings["clip_threshold"]))
        for run, update in enumerate(updates):
            update.sub_(self.average(self.first, run, update, settings["beta1"], go))
        self._average_squares(self.deviations, updates, "beta3", "eps_deviation", go)
        for run, update in enumerate(updates):
            update.copy_(self.first.read(run, whole(update), self.dtype))
        divide_by_root(matrices, updates, self.deviations, vectors=False)
        for run, update in enumerate(updates):
            self.descend(run, update, lr, go)

    def _average_squares(self, average: Tensor, tensors: Sequence[Tensor], beta: str, eps: str, taken: Tensor) -> None:
        """Take the sums of rows and columns of the squares, and eps for each, into their moving average."""
        (sums,) = self.matrices.reduce(self.matrices.margins(tensor.square() for tensor in tensors))
        sums += self.settings[eps] * self.matrices.lengths
        put(taken, average, average.lerp(sums, 1 - self.settings[beta]))

    def state(self) -> Mapping[str, Sequence[Tensor]]:
        """As ``Rule.state``."""
        return {
            **self.moment_state("first", self.first),
            **self.margins_state(self.moments),
            **self.margins_state(self.deviations, "deviation_"),
        }
