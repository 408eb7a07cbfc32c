"""The orthogonal matrix nearest to a given one, about: Newton-Schulz iteration, matrix products only.

With M = U S V^T, repeating X = p(X) from X = M / |M| on moves every singular value by the same odd polynomial, here

    p(x) = a x + b x^3 + c x^5,   in matrices   a X + (b X X^T + c (X X^T)^2) X

and leaves U and V alone. The coefficients are those of Jordan et al. 2024 (section "Newton-Schulz iteration"), chosen
for a steep start rather than for an end at 1: five steps take all of [0.01, 1] into [0.68, 1.21].
"""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, steps: int, eps: float) -> Tensor:
    """[m, n] to [m, n] whose non-zero singular values are near 1, in the matrix' dtype; a matrix of 0 stays 0.

    ``eps`` is added to the Frobenius norm.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.mT if is_tall else matrix
    norm = torch.linalg.vector_norm(wide, dtype=torch.promote_types(matrix.dtype, torch.float32))
    x = wide / (norm + eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def cost(rows: int, columns: int) -> int:
    """Multiplications of a step of ``orthogonalise``."""
    low, high = sorted((rows, columns))
    return low * low * (2 * high + low)
