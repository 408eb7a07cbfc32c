"""SM3-II (Anil et al. 2019, algorithm 2) with the rows and columns of each matrix as its cover (section 4).

Adagrad's sum of squared gradients of an element is bounded by the smaller of its row's and its column's bound. Of a
vector every element is a row of its own, so that its sums are Adagrad's own.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from megacore.optim.matrixwise import MatrixWise
from megacore.optim.moments import make_moment
from megacore.optim.rule import Share
from megacore.optim.taking import put

# Momentum as in section 5 (experiments); weight decay is not part of the paper.
DEFAULTS = MappingProxyType({"momentum": 0.9, "weight_decay": 0.0})
STATE = MappingProxyType({"first": "moment if momentum", "rows": "row", "columns": "column"})


class Sm3(MatrixWise):
    """One pass over the ranks a step: the maxima of rows and columns."""

    def __init__(self, share: Share, settings: Mapping[str, float]) -> None:
        super().__init__(share, settings)
        self.first = make_moment(share, "first", self.clock) if settings["momentum"] else None
        self.bounds = self.new_margins()

    @torch.no_grad()
    def update(self, grads: Sequence[Tensor], lr: float, taken: Tensor) -> None:
        """As ``Rule.update``."""
        self.clock += taken
        matrices, go = self.matrices, taken != 0
        grads = [grad.to(self.dtype) for grad in grads]
        # The sums are formed twice, run by run, rather than kept: they are as large as the weights.
        sums = (self._sums(run, grad) for run, grad in enumerate(grads))
        (bounds,) = matrices.reduce(matrices.margins(sums, "max"), op="max")
        for run, grad in enumerate(grads):
            # the paper's 0 / 0 = 0
            step = self._sums(run, grad).clamp_(min=torch.finfo(grad.dtype).tiny).rsqrt_().mul_(grad)
            if self.first is not None:
                step = self.average(self.first, run, step, self.settings["momentum"], go)
            self.descend(run, step, lr, go)
        put(go, self.bounds, bounds)

    def _sums(self, run: int, grad: Tensor) -> Tensor:
        """Bounds of the sums of squared gradients of a run's elements, this step's included: like ``grad``."""
        sums = grad.square()
        for rectangle, view in self.matrices.views(run, sums):
            rows, columns = self.matrices.rows(rectangle), self.matrices.columns(rectangle)
            view.add_(torch.minimum(self.bounds[rows].unsqueeze(1), self.bounds[columns]))
        return sums

    def state(self) -> Mapping[str, Sequence[Tensor]]:
        """As ``Rule.state``."""
        first = {} if self.first is None else self.moment_state("first", self.first)
        return {**first, **self.margins_state(self.bounds)}
