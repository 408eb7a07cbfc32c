"""Weight gradients by csrc/cpu: sums are float32 whatever the operands, and go straight into the buffer."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megacore.kernels.linear import NATIVE, native_refuses

CPU = torch.device("cpu")
FORMATS = (torch.float32, torch.bfloat16)
SHAPES = ((1, 1, 1), (5, 7, 3), (33, 18, 65), (513, 64, 6), (1027, 130, 250), (4, 6, 0), (0, 6, 4), (4, 0, 6))
"""Tokens, inputs, outputs: slabs, panels and tiles that are whole, odd and empty."""


def operands(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What is there, x, gradient."""
    if reason := native_refuses(CPU, dtype):
        pytest.skip(reason)
    torch.manual_seed(0)
    t, i, o = shape
    return torch.randn(o, i), torch.randn(t, i).to(dtype), torch.randn(t, o).to(dtype)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_over_tokens_are_never_in_16_bits(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    into, x, grad = operands(shape, dtype)
    want = into.double() + grad.double().t() @ x.double()
    sizes = into.abs().double() + grad.abs().double().t() @ x.abs().double()
    NATIVE.wgrad(into, x, grad)
    assert ((into - want).abs() <= 1e-6 * sizes).all()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_threads_and_strides_change_no_bit(dtype: torch.dtype) -> None:
    into, x, grad = operands((300, 70, 250), dtype)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for own in ((x, grad), (x.t().contiguous().t(), torch.cat((grad, grad), 1)[:, :250])):
                made.append(into.clone())
                NATIVE.wgrad(made[-1], *own)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(made[0], each) for each in made)


def test_what_is_not_a_number_is_told() -> None:
    """Also beside the last token, whose partner is none."""
    into, x, grad = operands((3, 4, 5), torch.bfloat16)
    x[2, 1] = torch.nan
    NATIVE.wgrad(into, x, grad)
    assert into[:, 1].isnan().all() and into[:, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("place", [torch.float64, torch.bfloat16], ids=str)
def test_other_buffers_are_served_too(place: torch.dtype) -> None:
    into, x, grad = operands((9, 4, 5), torch.bfloat16)
    into = into.to(place)
    want = into.double() + grad.double().t() @ x.double()
    NATIVE.wgrad(into, x, grad)
    assert into.dtype == place
    torch.testing.assert_close(into.double(), want, rtol=2e-2, atol=2e-2)


def test_torch_counts_its_work() -> None:
    into, x, grad = operands((9, 4, 5), torch.float32)
    with FlopCounterMode(display=False) as counter:
        NATIVE.wgrad(into, x, grad)
    assert counter.get_total_flops() == 2 * 9 * 4 * 5


def test_operands_that_do_not_fit_are_refused() -> None:
    into, x, grad = operands((9, 4, 5), torch.float32)
    for wrong in ((into, x[:8], grad), (into, x.bfloat16(), grad), (into[:, :3].contiguous(), x, grad)):
        with pytest.raises(RuntimeError, match="wgrad_"):
            torch.ops.megacore_cpu.wgrad_(*wrong)
