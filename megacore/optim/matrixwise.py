"""What optimizers have in common that keep statistics of rows, columns or matrices: weights, moments, what is saved."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from megacore.optim.matrices import Matrices
from megacore.optim.moments import Moment, weights_of
from megacore.optim.rule import Rule, Share
from megacore.optim.taking import descend, whole
from megacore.spec.matrices import Matrix


class MatrixWise(Rule):
    """Everything is computed in ``dtype``: float32, or float64 where weights are.

    Constructing it is collective over the share's groups, as ``Matrices`` is.
    """

    def __init__(self, share: Share, settings: Mapping[str, float]) -> None:
        super().__init__(share, settings)
        self.matrices = Matrices(share)
        self.dtype = self.matrices.dtype
        self.weights = weights_of(share, self.clock)

    @property
    def state_matrices(self) -> Sequence[Matrix]:
        """As ``Rule.state_matrices``."""
        return self.matrices.matrices

    def new_margins(self) -> Tensor:
        """Zeros for a number per row and one per column."""
        return self.matrices.zeros(self.matrices.num_rows + self.matrices.num_columns)

    def average(self, moment: Moment, run: int, value: Tensor, beta: float, taken: Tensor) -> Tensor:
        """The moving average of a run's values with this one, which ``moment`` keeps."""
        average = moment.read(run, whole(value), self.dtype).lerp(value, 1 - beta)
        moment.write(run, whole(value), average, taken)
        return average

    def descend(self, run: int, step: Tensor, lr: float, taken: Tensor) -> None:
        """As ``taking.descend``, of a share whose bf16 weights may be rounded by chance."""
        descend(taken, self.share, run, step, lr, self.weights)

    def margins_state(self, margins: Tensor, prefix: str = "") -> dict[str, Sequence[Tensor]]:
        """Rows and columns as ``Rule.state`` gives them: one tensor per logical matrix."""
        return {
            f"{prefix}rows": self.matrices.rows_by_matrix(margins),
            f"{prefix}columns": self.matrices.columns_by_matrix(margins),
        }

    def moment_state(self, name: str, moment: Moment) -> dict[str, Sequence[Tensor]]:
        """A moment as ``Rule.state`` gives it: one tensor per run."""
        return {name + part: tensors for part, tensors in moment.tensors().items()}
