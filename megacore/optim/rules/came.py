"""CAME (Luo et al. 2023, algorithm 2): Adafactor's updates, averaged, and smaller where they disagree with the average.

How far an update is off its average is kept as a row times a column, too. Vectors, of which the paper does not speak,
do without that, as in its authors' implementation.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from megacore.optim.factored import clipping, divide_by_root, scale
from megacore.optim.matrices import Matrices
from megacore.optim.moments import make_moment
from megacore.optim.rule import Rule, Share
from megacore.optim.taking import descend, put, whole

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


class Came(Rule):
    """Three passes over the ranks a step: Adafactor's two, and sums of rows and columns of the deviations."""

    def __init__(self, share: Share, settings: Mapping[str, float]) -> None:
        super().__init__(share, settings)
        self.matrices = Matrices(share)
        self.first = make_moment(share, "first", self.clock)
        self.moments = self.matrices.zeros(self.matrices.num_rows + self.matrices.num_columns)
        self.deviations = torch.zeros_like(self.moments)

    @torch.no_grad()
    def update(self, grads: Sequence[Tensor], lr: float, taken: Tensor) -> None:
        """As ``Rule.update``."""
        self.clock += taken
        matrices, settings, go = self.matrices, self.settings, taken != 0
        updates = [grad.to(matrices.dtype) for grad in grads]
        self._average(go, self.moments, updates, "beta2", "eps")
        divide_by_root(matrices, updates, self.moments)
        scale(matrices, updates, clipping(matrices, updates, settings["clip_threshold"]))
        for run, update in enumerate(updates):
            first = self.first.read(run, whole(update), matrices.dtype)
            self.first.write(run, whole(update), first.lerp(update, 1 - settings["beta1"]), go)
            update.sub_(self.first.read(run, whole(update), matrices.dtype))
        self._average(go, self.deviations, updates, "beta3", "eps_deviation")
        for run, update in enumerate(updates):
            update.copy_(self.first.read(run, whole(update), matrices.dtype))
        divide_by_root(matrices, updates, self.deviations, vectors=False)
        for run, update in enumerate(updates):
            descend(go, self.share, run, update, lr)

    def _average(self, go: Tensor, average: Tensor, tensors: Sequence[Tensor], beta: str, eps: str) -> None:
        """Take the sums of rows and columns of the squares, and eps for each, into their moving average."""
        (sums,) = self.matrices.reduce(self.matrices.margins(tensor.square() for tensor in tensors))
        sums += self.settings[eps] * self.matrices.lengths
        put(go, average, average.lerp(sums, 1 - self.settings[beta]))

    def state(self) -> Mapping[str, Sequence[Tensor]]:
        """As ``Rule.state``."""
        return {
            **{f"first{part}": tensors for part, tensors in self.first.tensors().items()},
            "rows": self.matrices.rows_by_matrix(self.moments),
            "columns": self.matrices.columns_by_matrix(self.moments),
            "deviation_rows": self.matrices.rows_by_matrix(self.deviations),
            "deviation_columns": self.matrices.columns_by_matrix(self.deviations),
        }
