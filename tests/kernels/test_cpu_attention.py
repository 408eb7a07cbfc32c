"""Causal attention by csrc/cpu, beyond what is tested with the whole table: blocks that are whole, odd and many."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megacore.kernels import compiled, fused, reference

CPU = torch.device("cpu")
SHAPES = (
    (1, 1, 1, 1, 2),
    (2, 6, 2, 49, 8),
    (1, 2, 1, 129, 80),
    (1, 3, 3, 200, 32),
    (2, 2, 2, 64, 128),
    (0, 2, 1, 3, 4),
)
"""Samples, query heads, key heads, tokens, dims."""


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of y, laid out as projections give them."""
    if reason := compiled.attention_refuses(CPU, dtype):
        pytest.skip(reason)
    torch.manual_seed(0)
    b, n, m, s, d = shape
    whole = torch.randn(b, s, n + 2 * m, d).to(dtype).transpose(1, 2)
    return *whole.split((n, m, m), 1), torch.randn(b, s, n, d).to(dtype).transpose(1, 2)


def everything(attend: object, *args: Tensor) -> list[Tensor]:
    """y and all gradients."""
    leaves = [each.detach().requires_grad_() for each in args[:3]]
    y = attend(*leaves, None, True, leaves[0].shape[-1] ** -0.5)
    return [y.detach(), *torch.autograd.grad(y, leaves, args[3])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_as_near_as_torchs_own(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args = operands(shape, dtype)
    wants = everything(reference.attention, *(each.double() for each in args))
    theirs, unit = everything(fused.attention, *args), 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20
    for got, their, want in zip(everything(compiled.attention, *args), theirs, wants, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        error, other = ((each.double() - want).norm() for each in (got, their))
        assert error <= 1.5 * other + unit * want.norm()


def test_threads_change_no_bit() -> None:
    args = operands((2, 4, 2, 100, 16), torch.bfloat16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = everything(compiled.attention, *args)
        torch.set_num_threads(3)
        got = everything(compiled.attention, *args)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_what_is_not_a_number_stays_one() -> None:
    q, k, v, grad = operands((1, 1, 1, 60, 4), torch.float32)
    v = v.clone()
    v[0, 0, 50, 1] = torch.nan
    y = everything(compiled.attention, q, k, v, grad)[0]
    assert y[0, 0, 50:, 1].isnan().all() and y[..., [0, 2, 3]].isfinite().all()


def test_torch_counts_its_work() -> None:
    """Two products forward, five backward; of hidden scores, too."""
    args = operands((2, 4, 2, 10, 8), torch.float32)
    with FlopCounterMode(display=False) as counter:
        everything(compiled.attention, *args)
    assert counter.get_total_flops() == (2 + 5) * 2 * (2 * 4 * 10 * 10 * 8)


def test_heads_that_do_not_fit_are_refused() -> None:
    q, k, _, _ = operands((1, 4, 2, 5, 8), torch.float32)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    y, sums = torch.empty(1, 5, 4, 8), torch.empty(1, 4, 5)
    call = torch.ops.megacore_cpu.attention_
    for wrong in ((q, k, k[:, :4]), (q[:, :, :3], k, k), (q, k.bfloat16(), k)):
        with pytest.raises(RuntimeError, match="attention_"):
            call(*wrong, y, sums, 1.0, None, None, None, None)
