"""Adam-mini (Zhang et al. 2024, algorithm 1): Adam with one second moment for a block of weights, their mean.

Blocks are those of the paper's partition for transformers: a head of query and key, an output neuron (row) of value,
attention output and MLP, a token (row) of embeddings and output matrix, the whole of a norm's weight. Biases, as in
the authors' implementation, have a second moment for every element.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from megacore.optim.matrixwise import MatrixWise
from megacore.optim.moments import make_moment
from megacore.optim.rule import Share
from megacore.optim.taking import put
from megacore.spec.matrices import Matrix

# Those of the AdamW that it replaces, as the paper advises; here of its Llama pre-training.
DEFAULTS = MappingProxyType({"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1})
STATE = MappingProxyType({"first": "moment", "second": "row"})


def rows_of_block(matrix: Matrix) -> int:
    """How many rows share a second moment: they hold the same number."""
    if matrix.is_vector:
        return 1 if matrix.name.endswith(".bias") else matrix.rows
    is_query_or_key = matrix.name.endswith(".attention.qkv.weight") and matrix.segment in (0, 1)
    return matrix.unit if is_query_or_key else 1


class AdamMini(MatrixWise):
    """One pass over the ranks a step: sums of rows."""

    def __init__(self, share: Share, settings: Mapping[str, float]) -> None:
        super().__init__(share, settings)
        self.first = make_moment(share, "first", self.clock)
        self.second = self.matrices.zeros(self.matrices.num_rows)

    @torch.no_grad()
    def update(self, grads: Sequence[Tensor], lr: float, taken: Tensor) -> None:
        """As ``Rule.update``."""
        self.clock += taken
        matrices, go = self.matrices, taken != 0
        grads = [grad.to(self.dtype) for grad in grads]
        beta1, beta2 = self.settings["beta1"], self.settings["beta2"]
        put(go, self.second, self.second.lerp(self._means_of_squares(grads), 1 - beta2))
        # In float64: next to 1, float32 would lose half the digits of the first steps' corrections.
        time = self.clock.double()
        correct1, correct2 = ((1 - beta**time).to(self.dtype) for beta in (beta1, beta2))
        divisors = (self.second / correct2).sqrt_().add_(self.settings["eps"])
        for run, grad in enumerate(grads):
            step = self.average(self.first, run, grad, beta1, go) / correct1
            for rectangle, view in matrices.views(run, step):
                view.div_(divisors[matrices.rows(rectangle)].unsqueeze(1))
            self.descend(run, step, lr, go)

    def _means_of_squares(self, grads: Sequence[Tensor]) -> Tensor:
        """The mean of the squared gradients of each row's block: [num_rows]."""
        matrices = self.matrices
        (sums,) = matrices.reduce(matrices.row_sums(grad.square() for grad in grads))
        means = sums / matrices.lengths[: matrices.num_rows]
        for matrix, rows in zip(matrices.matrices, matrices.rows_by_matrix(means)):
            blocks = rows.view(-1, rows_of_block(matrix))
            blocks.copy_(blocks.mean(dim=1, keepdim=True).expand_as(blocks))
        return means

    def state(self) -> Mapping[str, Sequence[Tensor]]:
        """As ``Rule.state``."""
        return {**self.moment_state("first", self.first), "second": self.matrices.rows_by_matrix(self.second)}
