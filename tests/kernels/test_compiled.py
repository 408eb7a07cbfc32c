"""Rows by csrc/cpu: the same bits from every instruction set and number of threads; what does not fit is refused.

That they mean what their references do is tested with the whole table (test_table.py).
"""

import math

import pytest
import torch
from torch import Tensor

from megacore.kernels import compiled, native, reference

FORMATS = (torch.float32, torch.bfloat16)
WIDTHS = (1, 7, 16, 63, 64, 65, 130, 1000)

pytestmark = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable() or "it is here")
ops = torch.ops.megacore_cpu


def rows_of(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, gradient."""
    torch.manual_seed(width)
    return torch.randn(70, width).to(dtype), torch.randn(width).to(dtype), torch.randn(70, width).to(dtype)


def everything(width: int, dtype: torch.dtype, isa: str) -> list[Tensor]:
    """What all operations give."""
    x, weight, grad = rows_of(width, dtype)
    y, inverse, grad_x = torch.empty_like(x), torch.empty(70), torch.empty_like(x)
    parts = torch.zeros(math.ceil(70 / compiled.BLOCK), width)
    ops.rms_norm_(x, weight, y, inverse, 1e-5, 1.0, isa)
    ops.rms_norm_backward_(grad, x, weight, inverse, grad_x, parts, 1.0, isa)
    both, gated, grad_both = torch.cat((3 * x, grad), 1), torch.empty_like(x), torch.empty(70, 2 * width, dtype=dtype)
    ops.swiglu_(both, None, gated, width, isa)
    ops.swiglu_(both, grad, grad_both, width, isa)
    largest, sums, exp, target = torch.empty(70), torch.empty(3, 70), torch.empty_like(x), torch.arange(70) - 3
    ops.logit_statistics_(5 * x, target, largest, sums, exp, isa)
    return [y, inverse, grad_x, parts, gated, grad_both, largest, sums, exp]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_instruction_sets_and_threads_change_no_bit(width: int, dtype: torch.dtype) -> None:
    before, want = torch.get_num_threads(), everything(width, dtype, "portable")
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for isa in native.instruction_sets():
                for got, one in zip(everything(width, dtype, isa), want, strict=True):
                    assert torch.equal(got, one), isa
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_the_exponential_is_right_over_its_whole_range(dtype: torch.dtype) -> None:
    """Gates from far below the least exponential to far above the largest."""
    gate = torch.cat((torch.linspace(-120, 120, 4001), torch.tensor([-3e38, 3e38, 0.0, -0.0, 88.4, -88.4]))).to(dtype)
    x = torch.stack((gate, torch.ones_like(gate)), 1)
    want = reference.swiglu(x.double())
    got = compiled.swiglu(x)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=1e-35)


def test_what_is_not_a_number_stays_one() -> None:
    x = torch.tensor([[torch.nan, 1.0], [1.0, torch.nan], [torch.inf, 1.0], [-torch.inf, 1.0]])
    got = compiled.swiglu(x)
    assert got.isnan()[:2].all() and got[2, 0] == torch.inf
    assert compiled.rms_norm(x, torch.ones(2), 1e-5)[:2].isnan().all()
    assert compiled.swiglu(x.bfloat16()).isnan()[:2].all()
    assert compiled.logit_statistics(x, torch.zeros(4, dtype=torch.int64))[1][0, :2].isnan().all()


@pytest.mark.parametrize("num_rows", [0, 1, 31, 32, 33, 5000])
def test_the_weights_gradient_is_a_sum_over_all_rows(num_rows: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(num_rows, 5).requires_grad_(), torch.randn(5).requires_grad_()
    grad = torch.randn(num_rows, 5)
    got = torch.autograd.grad(compiled.rms_norm(x, weight, 1e-5), (x, weight), grad)
    wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want = torch.autograd.grad(reference.rms_norm(*wide, 1e-5), wide, grad.double())
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * max(1, num_rows) ** 0.5)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, _ = rows_of(8, torch.float32)
    with pytest.raises(RuntimeError, match="rms_norm_: y must be contiguous in host memory, with 560 elements"):
        ops.rms_norm_(x, weight, torch.empty(69, 8), torch.empty(70), 1e-5, 0.0, "")
    with pytest.raises(RuntimeError, match="rms_norm_: weight must be .* of the dtype of the others"):
        ops.rms_norm_(x, weight.bfloat16(), torch.empty_like(x), torch.empty(70), 1e-5, 0.0, "")
    with pytest.raises(RuntimeError, match="rms_norm_backward_: parts"):
        ops.rms_norm_backward_(x, x, weight, torch.empty(70), torch.empty_like(x), torch.zeros(2, 8), 0.0, "")
    with pytest.raises(RuntimeError, match="swiglu_: x must be contiguous"):
        ops.swiglu_(x.t(), None, torch.empty(8, 35), 35, "")
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        ops.swiglu_(x.double(), None, torch.empty(70, 4).double(), 4, "")
    with pytest.raises(RuntimeError, match="isa 'sse' is not one of this processor's"):
        ops.swiglu_(x, None, torch.empty(70, 4), 4, "sse")


def test_the_operations_are_known_to_torchs_compiler() -> None:
    x, weight, grad = rows_of(8, torch.float32)
    calls = (
        (ops.rms_norm_, (x, weight, torch.empty_like(x), torch.empty(70), 1e-5, 0.0, "")),
        (
            ops.rms_norm_backward_,
            (grad, x, weight, torch.rand(70), torch.empty_like(x), torch.zeros(3, 8), 0.0, ""),
        ),
        (ops.swiglu_, (x, None, torch.empty(70, 4), 4, "")),
        (ops.swiglu_, (x, torch.randn(70, 4), torch.empty(70, 8), 4, "")),
    )
    for operation, arguments in calls:
        torch.library.opcheck(operation.default, arguments, test_utils=("test_schema", "test_faketensor"))
