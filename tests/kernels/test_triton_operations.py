"""Our Triton kernels as operations of torch: what torch's own checks say of each, and what the table does not test.

They need CPU tensors to be taken, so they run in Triton's interpreter: test_triton.py starts a process for them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megacore.kernels.operations import OPERATIONS, numbers
from megacore.kernels.triton import available

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not available.interpreted(), reason="runs in Triton's interpreter (test_triton.py starts it)"
)


def float32(*shape: int) -> torch.Tensor:
    return numbers(*shape).float().requires_grad_()


def calls() -> Iterator[tuple[str, Callable[[], tuple[Any, ...]]]]:
    """Every operation with arguments."""
    x, weight, inverse = (lambda: float32(3, 6)), (lambda: float32(6)), (lambda: torch.rand(3))
    heads, angle = (lambda: float32(2, 3, 2, 8)), numbers(1, 3, 1, 4).float()
    turned = (angle.cos(), angle.sin(), True, False)
    scores, mask = (lambda: float32(2, 2, 3, 5)), torch.rand(2, 1, 3, 5) < 0.5
    yield "rms_norm", lambda: (x(), weight(), 1e-5, 0.0)
    yield "rms_norm_backward", lambda: (x().detach(), None, x().detach(), weight().detach(), inverse(), 0.0)
    yield "rms_norm_add", lambda: (x(), x(), weight(), 1e-5, 1.0)
    yield "layer_norm", lambda: (x(), weight(), weight(), 1e-5)
    yield (
        "layer_norm_backward",
        lambda: (x().detach(), x().detach(), weight().detach(), inverse(), inverse()),
    )
    yield "gated", lambda: (x(), "silu")
    yield "gated_backward", lambda: (float32(3, 3).detach(), x().detach(), "gelu")
    yield "bias_gelu", lambda: (x(), weight(), None)
    yield "rope", lambda: (heads(), *turned)
    yield "rope_", lambda: (heads().detach(), *turned)
    yield "softmax", lambda: (scores(), mask, True, 0.5)
    yield "softmax_backward", lambda: (scores().detach(), torch.rand(2, 2, 3, 5), 0.5)
    yield "logit_statistics", lambda: (x().detach(), torch.tensor([0, 7, 5]))
    yield "squares", lambda: ([x().detach(), weight().detach()],)
    yield "quantise", lambda: (x().detach(), torch.tensor(2.0), False)
    yield (
        "adamw_",
        lambda: (*(float32(9).detach() for _ in range(3)), torch.rand(9), None, torch.full((9,), 0.5), False),
    )


CALLS = dict(calls())


def operations() -> dict[str, Any]:
    """What the modules of megacore/kernels/triton have registered."""
    for kernel in OPERATIONS:
        from megacore.kernels.table import TABLE

        for each in TABLE:
            if each.operation == kernel and each.backend == "triton":
                each.loaded  # noqa: B018 - importing registers
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("megacore_triton::")]
    return {name.partition("::")[2]: getattr(torch.ops.megacore_triton, name.partition("::")[2]) for name in names}


def test_every_operation_is_checked() -> None:
    assert set(operations()) == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_torch_finds_no_fault(name: str) -> None:
    """Its schema says what is written, its fake twin gives the same shapes, its gradients go through torch.compile."""
    torch.manual_seed(0)
    torch.library.opcheck(operations()[name].default, CALLS[name]())


@pytest.mark.parametrize("how", ["whole", "part"])
def test_rope_turns_in_place_and_back(how: str) -> None:
    """Also where x is a part of a larger tensor; the rest of that is left alone."""
    from megacore.kernels import reference
    from megacore.kernels.triton.rope import rope_

    torch.manual_seed(0)
    whole = numbers(2, 5, 9, 10)
    x = whole if how == "whole" else whole[:, :, 2:5]
    before, angle = whole.clone(), numbers(1, 5, 1, 4)
    want = reference.rope(x, angle.cos(), angle.sin())
    want_interleaved = reference.rope_interleaved(x, angle.cos(), angle.sin())
    assert rope_(x, angle.cos(), angle.sin()) is x
    torch.testing.assert_close(x, want, rtol=1e-13, atol=1e-13)
    rope_(x, angle.cos(), angle.sin(), back=True)
    torch.testing.assert_close(whole, before, rtol=1e-13, atol=1e-13)
    rope_(x, angle.cos(), angle.sin(), interleaved=True)
    torch.testing.assert_close(x, want_interleaved, rtol=1e-13, atol=1e-13)
    if how == "part":
        assert torch.equal(whole[:, :, :2], before[:, :, :2]) and torch.equal(whole[:, :, 5:], before[:, :, 5:])


def test_rows_that_no_program_holds_are_refused() -> None:
    from megacore.kernels.triton.norms import rms_norm

    with pytest.raises(ValueError, match="rows of 70000 elements; one program holds at most 65536"):
        rms_norm(torch.zeros(1, 70_000), torch.ones(70_000), 1e-5)


def test_many_rows_are_shared_out_to_programs() -> None:
    """More rows than programs in backward: shares of the weight's gradient are summed."""
    from megacore.kernels import reference
    from megacore.kernels.triton import norms

    torch.manual_seed(0)
    x, weight = numbers(700, 3).requires_grad_(), numbers(3).requires_grad_()
    grad = numbers(700, 3)
    want = torch.autograd.grad(reference.rms_norm(x, weight, 1e-5), (x, weight), grad)
    got = torch.autograd.grad(norms.rms_norm(x, weight, 1e-5), (x, weight), grad)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_rows_longer_than_a_block_of_logits() -> None:
    from megacore.kernels import reference
    from megacore.kernels.triton.statistics import BLOCK, logit_statistics

    torch.manual_seed(0)
    logits, target = numbers(2, BLOCK + 77), torch.tensor([BLOCK + 5, 3])
    for got, want in zip(logit_statistics(logits, target), reference.logit_statistics(logits, target)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_on_the_cpu_the_interpreter_is_taken_by_name_only() -> None:
    from megacore.kernels.table import resolve

    kernels, choices = resolve(CPU, torch.float32, {"swiglu": "triton"})
    assert kernels.swiglu.__module__ == "megacore.kernels.triton.activations"
    taken = {choice.operation: choice.backend for choice in choices}
    assert taken["swiglu"] == "triton" and "triton" not in {**taken, "swiglu": ""}.values()
