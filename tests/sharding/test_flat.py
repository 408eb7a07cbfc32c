"""Parameters and gradients live in flat buffers; the module's tensors are windows onto them."""

import torch
from torch import nn

from megacore.sharding.flat import FlatParameters


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2, bias=False)).double()


def test_a_module_moves_in_unchanged() -> None:
    ours, theirs = module(), module()
    flat = FlatParameters.adopt([ours])
    for (name, param), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(param, other)
        assert param.data_ptr() == flat.params.views()[name].data_ptr()
        assert param.grad is not None
        assert param.grad.data_ptr() == flat.grads.views()[name].data_ptr()
    assert [slot.name for slot in flat.params.layout.slots] == [name for name, _ in ours.named_parameters()]


def test_backward_adds_into_the_buffer() -> None:
    ours, theirs = module(), module()
    flat = FlatParameters.adopt([ours])
    for microbatch in torch.randn(3, 4, 5, dtype=torch.float64):
        ours(microbatch).square().sum().backward()
        theirs(microbatch).square().sum().backward()
    for name, param in theirs.named_parameters():
        assert param.grad is not None
        torch.testing.assert_close(flat.grads.views()[name], param.grad, rtol=1e-13, atol=1e-13)


def test_writing_the_buffer_changes_the_module() -> None:
    ours = module()
    flat = FlatParameters.adopt([ours])
    flat.params.data.mul_(0)
    assert not ours(torch.randn(2, 5, dtype=torch.float64)).any()


def test_gaps_are_zero_and_views_leave_them_alone() -> None:
    flat = FlatParameters.adopt([module()])
    for view in (*flat.params.views().values(), *flat.grads.views().values()):
        view.zero_()
    assert not flat.params.data.any()
    assert not flat.grads.data.any()


def test_modules_lie_behind_each_other_and_what_they_share_lies_once() -> None:
    first, second = module(), module()
    both = nn.ModuleDict({"a": first}), nn.ModuleDict({"b": second, "a": first})
    flat = FlatParameters.adopt(both)
    names = [name for name, _ in both[0].named_parameters()] + [f"b.{name}" for name, _ in second.named_parameters()]
    assert [slot.name for slot in flat.params.layout.slots] == names
    assert next(first.parameters()).data_ptr() == flat.params.data.data_ptr()
