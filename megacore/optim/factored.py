"""A matrix of non-negative numbers known by its margins: the one of rank one with the same sums of rows and columns.

It is V = R C / sum(R), where R are the sums of rows and C those of columns; of all rank-one matrices it has the least
generalised Kullback-Leibler divergence (Shazeer and Stern 2018, section 3). Of a vector (one column) nothing is lost.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megacore.optim.matrices import Matrices


def divide_by_root(matrices: Matrices, tensors: Sequence[Tensor], margins: Tensor, vectors: bool = True) -> None:
    """Divide by sqrt(V), element by element and in place; with ``vectors`` False, only what belongs to matrices.

    ``tensors`` are 1-D, one per run; ``margins`` the whole sums of rows and columns of V.
    """
    if not tensors:
        return  # perhaps there are no matrices at all
    totals = torch.stack([rows.sum() for rows in matrices.rows_by_matrix(margins)])
    factors = margins.clone()
    factors[: matrices.num_rows] /= totals[matrices.matrix_of_row]
    factors.rsqrt_()
    for rectangle, view in matrices.each(tensors):
        if vectors or not rectangle.matrix.is_vector:
            view.mul_(factors[matrices.rows(rectangle)].unsqueeze(1)).mul_(factors[matrices.columns(rectangle)])


def clipping(matrices: Matrices, tensors: Sequence[Tensor], threshold: float) -> Tensor:
    """1 / max(1, RMS / threshold) of every matrix (Shazeer and Stern 2018, section 6): [number of matrices].

    One pass over all ranks.
    """
    (squares,) = matrices.reduce(matrices.sums(tensor.square() for tensor in tensors))
    return (squares / matrices.numels).sqrt_().div_(threshold).clamp_(min=1).reciprocal_()


def scale(matrices: Matrices, tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply each matrix by its factor, in place."""
    for rectangle, view in matrices.each(tensors):
        view.mul_(factors[matrices.place[rectangle.matrix]])
