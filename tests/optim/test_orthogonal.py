"""Newton-Schulz makes orthogonal matrices, about, of any shape."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megacore.optim.orthogonal import COEFFICIENTS, cost, orthogonalise


def some_matrix(rows: int, columns: int, condition: float = 20.0) -> torch.Tensor:
    """Of full rank: singular values from 1 down to 1 / condition."""
    make = torch.Generator().manual_seed(100 * rows + columns)
    u, _, vh = torch.linalg.svd(torch.randn(rows, columns, generator=make, dtype=torch.float64), full_matrices=False)
    return u * torch.logspace(0, -torch.tensor(condition).log10(), min(rows, columns), dtype=torch.float64) @ vh


SHAPES = [(8, 8), (5, 24), (24, 5), (1, 9), (9, 1), (1, 1)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e4, 1e-3])
def test_singular_values_come_near_1(rows: int, columns: int, dtype: torch.dtype, size: float) -> None:
    matrix = some_matrix(rows, columns)
    result = orthogonalise((size * matrix).to(dtype), 5, 1e-7)
    assert (result.shape, result.dtype) == (matrix.shape, dtype)
    u, s, vh = torch.linalg.svd(result.double(), full_matrices=False)
    low, high = (0.68, 1.21) if dtype != torch.bfloat16 else (0.64, 1.25)
    assert low < s.min() <= s.max() < high
    # no direction is turned: the polar factor of the result is that of the matrix
    expected_u, _, expected_vh = torch.linalg.svd(matrix, full_matrices=False)
    precision = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 0.3}[dtype]
    assert (u @ vh - expected_u @ expected_vh).abs().max() < precision


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_tall_matrix_is_a_wide_one_transposed(rows: int, columns: int) -> None:
    matrix = some_matrix(rows, columns)
    torch.testing.assert_close(
        orthogonalise(matrix, 5, 1e-7).mT, orthogonalise(matrix.mT.contiguous(), 5, 1e-7), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_stays_zero(dtype: torch.dtype) -> None:
    assert not orthogonalise(torch.zeros(4, 6, dtype=dtype), 5, 1e-7).any()


def test_what_has_no_gradient_in_it_gets_none() -> None:
    """Of a matrix that is not of full rank, the rest stays 0."""
    matrix = some_matrix(6, 8)
    matrix[2] = 0
    matrix[:, 5] = 0
    result = orthogonalise(matrix, 5, 1e-7)
    assert not result[2].any()
    assert not result[:, 5].any()
    assert result.isfinite().all()


def test_a_matrix_is_left_alone() -> None:
    matrix = some_matrix(7, 4)
    before = matrix.clone()
    orthogonalise(matrix, 5, 1e-7)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize(("rows", "columns"), [(6, 10), (10, 6), (7, 7)])
def test_cost_is_what_torch_counts(rows: int, columns: int) -> None:
    matrix = some_matrix(rows, columns)
    with FlopCounterMode(display=False) as counter:
        orthogonalise(matrix, 5, 1e-7)
    assert counter.get_total_flops() == 5 * 2 * cost(rows, columns)


def test_the_iteration_takes_a_wide_range_near_1() -> None:
    """What the file says of its coefficients."""
    a, b, c = COEFFICIENTS
    x = torch.linspace(0.01, 1, 10001, dtype=torch.float64)
    for _ in range(5):
        x = a * x + b * x**3 + c * x**5
    assert 0.68 < x.min() <= x.max() < 1.21
