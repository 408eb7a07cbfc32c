"""Rows to experts and back, beyond what is tested with the whole table."""

import pytest
import torch

from megacore.config.kernels import backends
from megacore.kernels import experts, reference
from megacore.kernels.experts import grouped_refuses

CHOICE = torch.tensor([[2, 0], [1, 2], [2, 1], [0, 2]])


@pytest.mark.parametrize("kernels", [reference, experts], ids=["reference", "gather"])
def test_rows_are_sorted_by_expert_and_then_by_token(kernels: object) -> None:
    x = torch.arange(4.0)[:, None]
    rows, order, counts = kernels.permute(x, CHOICE, 4)
    assert rows[:, 0].tolist() == [0, 3, 1, 2, 0, 1, 2, 3]
    assert counts.tolist() == [2, 2, 4, 0]
    assert CHOICE.flatten()[order].tolist() == sorted(CHOICE.flatten().tolist())
    back = kernels.unpermute(rows, order, torch.tensor([[0.25, 0.75]]).expand(4, 2))
    assert torch.equal(back, x)


def test_an_expert_without_rows_learns_nothing() -> None:
    if reason := grouped_refuses(torch.device("cpu"), torch.bfloat16):
        pytest.skip(reason)
    x, weight = torch.randn(6, 16).bfloat16(), torch.randn(3, 8, 16).bfloat16().requires_grad_()
    experts.grouped_product(x, weight, torch.tensor([4, 0, 2])).sum().backward()
    assert weight.grad is not None
    assert weight.grad.flatten(1).any(1).tolist() == [True, False, True]


def test_torch_finds_no_fault_with_the_grouped_product() -> None:
    x, weight = torch.randn(6, 16).requires_grad_(), torch.randn(3, 8, 16).requires_grad_()
    ends = torch.tensor([4, 4, 6], dtype=torch.int32)
    torch.library.opcheck(torch.ops.megacore.grouped_product.default, (x, weight, ends))
    torch.library.opcheck(torch.ops.megacore.grouped_weights.default, (torch.randn(6, 8), x.detach(), ends))


def test_runs_are_not_offered_what_no_model_calls() -> None:
    assert not {"permute", "unpermute", "grouped_product", "bias_dropout_add"} & set(backends())
