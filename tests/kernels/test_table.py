"""Every entry of the table against its reference, forward and backward, on odd shapes and strided inputs."""

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from megacore.kernels import reference
from megacore.kernels.linear import LinearKernel
from megacore.kernels.table import TABLE, Choice, Kernel, resolve

CPU = torch.device("cpu")
FUNCTIONS = [kernel for kernel in TABLE if kernel.operation != "linear"]  # that is three products
DTYPES = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}
ELEMENTWISE = ("swiglu", "geglu", "gelu", "gelu_erf", "relu2")


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def strided(x: Tensor, how: str) -> Tensor:
    """The same numbers laid out otherwise in memory."""
    if how == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "sliced":
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    return x


def cases(operation: str) -> Iterator[tuple[object, ...]]:
    """Arguments, their floating-point tensors in float64."""
    torch.manual_seed(0)
    if operation in ELEMENTWISE:
        for shape in ((1, 2), (5, 14), (3, 7, 22), (0, 6)):
            yield (3 * numbers(*shape),)
    elif operation == "rms_norm":
        for shape in ((1, 1), (5, 7), (2, 3, 33)):
            yield numbers(*shape), numbers(shape[-1]), 1e-5
        yield 1e-4 * numbers(4, 9), numbers(9), 1e-5  # where eps counts
        yield numbers(2, 3, 7), numbers(7), 1e-5, 1.0  # what is learned is the difference from 1
    elif operation == "layer_norm":
        for shape in ((1, 2), (5, 7), (2, 3, 33)):
            yield 2 + numbers(*shape), numbers(shape[-1]), numbers(shape[-1]), 1e-5
    elif operation == "rope":
        for b, s, n, d in ((1, 1, 1, 2), (2, 5, 3, 6), (3, 4, 1, 10)):
            for angles in (1, b):
                angle = 9 * numbers(angles, s, 1, d // 2)
                yield numbers(b, s, n, d), angle.cos(), angle.sin()
                yield numbers(b, s, n, d + 3), angle.cos(), angle.sin()  # the last three dims stay
    elif operation == "attention_softcap":
        for *args, keep in (*attention_cases(dropping=False), *attention_cases(dropping=True)):
            yield *args, keep, 0.7
    else:
        yield from attention_cases(dropping=operation == "attention_dropout")


def attention_cases(dropping: bool) -> Iterator[tuple[object, ...]]:
    for b, n, m, s, d in ((1, 1, 1, 1, 2), (2, 6, 2, 7, 5), (2, 3, 1, 9, 8), (1, 4, 4, 5, 3)):
        q, k, v = numbers(b, n, s, d), numbers(b, m, s, d), numbers(b, m, s, d)
        seen = torch.rand(b, 1, s, s) < 0.5
        seen |= torch.eye(s, dtype=torch.bool)  # every token sees itself
        bias = torch.where(seen, numbers(1, n, s, s), -torch.inf)
        keep = ((torch.rand(b, n, s, s) < 0.7) / 0.7).double() if dropping else None
        for mask, causal in ((None, True), (None, False), (seen, False), (bias, False)):
            yield q, k, v, mask, causal, d**-0.5, keep


def outcome(kernel: Kernel, args: tuple[object, ...], dtype: torch.dtype, how: str) -> list[Tensor]:
    """The result and the gradients of everything that has one; inputs must stay as they were."""
    inputs: list[object] = []
    for place, arg in enumerate(args):
        if isinstance(arg, Tensor) and arg.is_floating_point():
            arg = strided(arg.to(dtype), how) if arg.dim() == 4 or place == 0 else arg.to(dtype)
        inputs.append(arg)
    with_grad = 1 if kernel.operation == "rope" else 3  # angles have none; masks come after the third
    differentiable = [arg.requires_grad_() for arg in inputs[:with_grad] if isinstance(arg, Tensor)]
    before = [arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in inputs]
    out = kernel.function(*inputs)
    assert out.dtype == dtype
    weight = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).to(dtype).view(out.shape)
    grads = torch.autograd.grad(out, differentiable, strided(weight, how))
    for arg, old in zip(inputs, before):
        assert torch.equal(arg, old) if isinstance(arg, Tensor) else arg == old, "an input was changed"
    for arg in differentiable:
        arg.requires_grad_(False)
    return [out.detach(), *grads]


@cache
def wanted(operation: str) -> list[tuple[tuple[object, ...], list[Tensor]]]:
    """All cases of an operation with what its reference makes of them in float64."""
    name = "attention" if operation.startswith("attention_") else operation
    meaning = Kernel(operation, "reference", getattr(reference, name))
    return [(args, outcome(meaning, args, torch.float64, "contiguous")) for args in cases(operation)]


@pytest.mark.parametrize("how", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", FUNCTIONS, ids=lambda kernel: f"{kernel.operation}-{kernel.backend}")
def test_entry_is_its_reference(kernel: Kernel, dtype: torch.dtype, how: str) -> None:
    tolerance = DTYPES[dtype]
    if reason := kernel.refuses(CPU, dtype):
        pytest.skip(reason)
    for args, wants in wanted(kernel.operation):
        for got, want in zip(outcome(kernel, args, dtype, how), wants, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("how", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [k for k in TABLE if k.operation == "linear"], ids=lambda kernel: kernel.backend)
def test_a_linear_kernel_is_three_products(kernel: Kernel, dtype: torch.dtype, how: str) -> None:
    """Also where a rank has no rows, no columns or no tokens."""
    if kernel.refuses(CPU, dtype):
        with pytest.raises(ValueError, match="no linear"):
            resolve(CPU, dtype, {"linear": kernel.backend})
        return
    linear, tolerance = kernel.function, DTYPES[dtype]
    assert isinstance(linear, LinearKernel)
    torch.manual_seed(0)
    for t, i, o in ((1, 1, 1), (5, 7, 3), (33, 18, 65), (4, 6, 0), (0, 6, 4), (4, 0, 6)):
        wide = numbers(t, i), numbers(o, i), numbers(t, o), numbers(o, i)
        x, weight, grad = (strided(tensor.to(dtype), how) for tensor in wide[:3])
        into = wide[3].to(dtype, copy=True)
        place = into.data_ptr()
        linear.wgrad(into, x, grad)
        assert into.data_ptr() == place
        for got, want in (
            (linear.forward(x, weight), torch.einsum("ti,oi->to", wide[0], wide[1])),
            (linear.dgrad(grad, weight), torch.einsum("to,oi->ti", wide[2], wide[1])),
            (into, wide[3] + torch.einsum("to,ti->oi", wide[2], wide[0])),
        ):
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), want, rtol=20 * tolerance, atol=20 * tolerance)


def test_a_gradient_that_is_one_number_repeated() -> None:
    """What sum() sends back has strides of 0."""
    for kernel in TABLE:
        if kernel.operation in ELEMENTWISE:
            x = numbers(4, 6).requires_grad_()
            (got,) = torch.autograd.grad(kernel.function(x).sum(), x)
            (want,) = torch.autograd.grad(getattr(reference, kernel.operation)(x).sum(), x)
            torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_each_operation_takes_the_first_backend_that_is_willing() -> None:
    kernels, choices = resolve(CPU, torch.float32)
    willing = [kernel for kernel in TABLE if not kernel.refuses(CPU, torch.float32)]
    firsts = {kernel.operation: kernel for kernel in reversed(willing)}
    assert [(choice.operation, choice.backend) for choice in choices] == [
        (kernel.operation, kernel.backend) for kernel in sorted(firsts.values(), key=TABLE.index)
    ]
    for operation, kernel in firsts.items():
        assert getattr(kernels, operation) is kernel.function


def test_every_operation_ends_in_plain_pytorch_which_refuses_nothing() -> None:
    for operation in {kernel.operation for kernel in TABLE}:
        last = [kernel for kernel in TABLE if kernel.operation == operation][-1]
        assert last.backend == ("torch" if operation == "linear" else "reference")
        assert last.refuses(CPU, torch.float16) == ""


def test_a_named_backend_is_taken() -> None:
    kernels, choices = resolve(CPU, torch.float32, {"attention": "reference"})
    assert kernels.attention is reference.attention
    assert Choice("attention", "reference", ()) in choices


def test_a_backend_that_refuses_is_passed_over_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(device: torch.device, dtype: torch.dtype) -> str:
        return "" if dtype == torch.bfloat16 else f"wants bf16, not {dtype}"

    picky = Kernel("relu2", "picky", torch.relu, refuses)
    monkeypatch.setattr("megacore.kernels.table.TABLE", (picky, *TABLE))
    kernels, choices = resolve(CPU, torch.float32)
    assert kernels.relu2 is reference.relu2
    assert choices[0] == Choice("relu2", "reference", ("picky: wants bf16, not torch.float32",))
    assert resolve(CPU, torch.bfloat16)[0].relu2 is torch.relu
    with pytest.raises(ValueError, match="no relu2 for torch.float32 on cpu: picky: wants bf16, not torch.float32"):
        resolve(CPU, torch.float32, {"relu2": "picky"})


def test_strangers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kernels: \['conv'\] are not operations; there are \['linear', 'rms_norm'"):
        resolve(CPU, torch.float32, {"conv": "reference"})
    with pytest.raises(ValueError, match="kernels: no rope for .*: no backend 'cuda'"):
        resolve(CPU, torch.float32, {"rope": "cuda"})
