"""Every backend of the table against its operation's reference, forward and backward: on odd and empty shapes and on
strided inputs, as ``operations`` says. Triton's kernels are among them where its interpreter runs (see test_triton.py).
"""

from dataclasses import fields
from functools import cache

import pytest
import torch
from torch import Tensor

from megacore.config.kernels import OPTIMIZER, backends
from megacore.kernels import adamw, native, reference, transformer_engine
from megacore.kernels.choice import Choice, Kernel
from megacore.kernels.linear import LinearKernel
from megacore.kernels.operations import OPERATIONS, Arguments, Operation, cast, tensors_of
from megacore.kernels.table import TABLE, Kernels, explain, first_willing, packages, resolve

CPU = torch.device("cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FUNCTIONS = [kernel for kernel in TABLE if kernel.operation != "linear"]  # that is three products
LAYOUTS = ("contiguous", "transposed", "sliced")


def name_of(kernel: Kernel) -> str:
    return f"{kernel.operation}-{kernel.backend}"


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def strided(x: Tensor, how: str) -> Tensor:
    """The same numbers laid out otherwise in memory."""
    if how == "transposed" and x.dim():
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "sliced" and x.dim():
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype, device=x.device)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    return x


def laid_out(argument: object, how: str) -> object:
    """Every floating-point tensor of an argument, laid out so."""
    if isinstance(argument, Tensor):
        return strided(argument, how) if argument.is_floating_point() else argument
    return [laid_out(each, how) for each in argument] if isinstance(argument, (list, tuple)) else argument


@cache
def examples(operation: str, dtype: torch.dtype) -> list[Arguments]:
    """All examples of an operation, rounded to ``dtype``."""
    torch.manual_seed(0)
    return [cast(args, dtype) for args in OPERATIONS[operation].examples()]


def outcome(operation: Operation, function: object, args: Arguments, how: str) -> list[Tensor]:
    """The results and the gradients of everything that has one; inputs stay as they were, or are the results."""
    inputs = [laid_out(arg, how) if how != "contiguous" else arg for arg in args]
    if operation.in_place:
        inputs = [[each.clone() for each in arg] if isinstance(arg, (list, tuple)) else arg for arg in inputs]
    before = [tensor.detach().clone() for tensor in tensors_of(inputs)]
    differentiable = [inputs[place].requires_grad_() for place in operation.with_grad]
    results = tensors_of(operation.call(function, *inputs))
    pulled = [result for result in results if result.requires_grad]
    assert len(pulled) == (len(results) if differentiable else 0)
    weights = [strided(torch.linspace(-1, 2, each.numel()).to(each).view(each.shape), how) for each in pulled]
    grads = torch.autograd.grad(pulled, differentiable, weights) if pulled else ()
    for arg in differentiable:
        arg.requires_grad_(False)
    if not operation.in_place:
        for arg, old in zip(tensors_of(inputs), before, strict=True):
            assert torch.equal(arg.nan_to_num(7.0), old.nan_to_num(7.0)), "an input was changed"
    return [result.detach() for result in results] + list(grads)


@cache
def wanted(name: str, dtype: torch.dtype) -> list[list[Tensor]]:
    """What the reference makes, in float64, of every example that was rounded to ``dtype``."""
    operation = OPERATIONS[name]
    return [outcome(operation, operation.reference, widened(args), "contiguous") for args in examples(name, dtype)]


def widened(argument: object) -> object:
    if isinstance(argument, Tensor):
        return argument.double() if argument.is_floating_point() and argument.dim() else argument
    return tuple(map(widened, argument)) if isinstance(argument, (list, tuple)) else argument


def check(kernel: Kernel, dtype: torch.dtype, how: str, device: torch.device) -> None:
    operation = OPERATIONS[kernel.operation]
    if dtype not in operation.tolerance:
        pytest.skip(f"{operation.name} is not for {dtype}")
    if operation.in_place and how != "contiguous":
        pytest.skip(f"{operation.name} takes contiguous tensors")
    if reason := kernel.refuses(device, dtype):
        pytest.skip(reason)
    tolerance = operation.tolerance[dtype]
    for args, wants in zip(examples(operation.name, dtype), wanted(operation.name, dtype), strict=True):
        with torch.no_grad():
            formats = [each.dtype for each in tensors_of(operation.call(operation.reference, *cloned(args)))]
        gots = outcome(operation, kernel.loaded, cast(args, dtype, device), how)
        assert [got.dtype for got in gots[: len(formats)]] == formats
        for got, want in zip(gots, wants, strict=True):
            assert got.device.type == device.type
            torch.testing.assert_close(
                got.double().cpu(), want.double(), rtol=tolerance, atol=tolerance, equal_nan=not tolerance
            )


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", FUNCTIONS, ids=name_of)
def test_a_backend_is_its_reference(kernel: Kernel, dtype: torch.dtype, how: str) -> None:
    check(kernel, dtype, how, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", FUNCTIONS, ids=name_of)
def test_a_backend_is_its_reference_on_a_gpu(kernel: Kernel, dtype: torch.dtype, how: str) -> None:
    check(kernel, dtype, how, torch.device("cuda"))


def cloned(argument: object) -> object:
    if isinstance(argument, Tensor):
        return argument.clone()
    return tuple(map(cloned, argument)) if isinstance(argument, (list, tuple)) else argument


@pytest.mark.parametrize("kernel", FUNCTIONS, ids=name_of)
def test_tensors_without_numbers_go_through(kernel: Kernel) -> None:
    """Shapes and formats of results and gradients are known without a device, as torch.compile needs it."""
    operation = OPERATIONS[kernel.operation]
    try:
        function = kernel.loaded
    except ImportError as reason:
        pytest.skip(str(reason))
    if kernel.backend == "apex" or (kernel.backend == "native" and kernel.refuses(CPU, torch.float32)):
        pytest.skip(kernel.refuses(CPU, torch.float32))
    for args in examples(operation.name, torch.float32):
        want = outcome(operation, operation.reference, args, "contiguous")
        got = outcome_on_meta(operation, function, cast(args, torch.float32, "meta"))
        assert [(one.shape, one.dtype) for one in got] == [(one.shape, one.dtype) for one in want]
        assert all(one.is_meta for one in got)


def outcome_on_meta(operation: Operation, function: object, args: Arguments) -> list[Tensor]:
    differentiable = [args[place].requires_grad_() for place in operation.with_grad]
    results = tensors_of(operation.call(function, *args))
    if not differentiable:
        return results
    return [*results, *torch.autograd.grad(results, differentiable, [torch.empty_like(each) for each in results])]


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [k for k in TABLE if k.operation == "linear"], ids=lambda kernel: kernel.backend)
def test_a_linear_kernel_is_three_products(kernel: Kernel, dtype: torch.dtype, how: str) -> None:
    """Also where a rank has no rows, no columns or no tokens."""
    if kernel.refuses(CPU, dtype):
        with pytest.raises(ValueError, match="no linear"):
            resolve(CPU, dtype, {"linear": kernel.backend})
        return
    linear, tolerance = kernel.function, 2 * OPERATIONS["linear"].tolerance[dtype]
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
        if kernel.operation in ("swiglu", "geglu", "gelu", "gelu_erf", "relu2") and not kernel.refuses(
            CPU, torch.float64
        ):
            x = numbers(4, 6).requires_grad_()
            (got,) = torch.autograd.grad(kernel.loaded(x).sum(), x)
            (want,) = torch.autograd.grad(getattr(reference, kernel.operation)(x).sum(), x)
            torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_each_operation_takes_the_first_backend_that_is_willing() -> None:
    kernels, choices = resolve(CPU, torch.float32)
    called = {field.name for field in fields(Kernels)}
    willing = [
        kernel
        for kernel in TABLE
        if kernel.operation in called and kernel.by_default and not kernel.refuses(CPU, torch.float32)
    ]
    firsts = {kernel.operation: kernel for kernel in reversed(willing)}
    assert [(choice.operation, choice.backend) for choice in choices] == [
        (operation, firsts[operation].backend) for operation in (field.name for field in fields(Kernels))
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
    assert Choice("relu2", "reference", ("picky: wants bf16, not torch.float32",)) in choices
    assert resolve(CPU, torch.bfloat16)[0].relu2 is torch.relu
    with pytest.raises(ValueError, match="no relu2 for torch.float32 on cpu: picky: wants bf16, not torch.float32"):
        resolve(CPU, torch.float32, {"relu2": "picky"})


def test_what_nobody_has_measured_is_taken_by_name_only() -> None:
    eager = Kernel("rope", "unmeasured", reference.rope, by_default=False)
    kernel, choice = first_willing((eager, *(k for k in TABLE if k.operation == "rope")), CPU, torch.float32)
    assert kernel.backend == "fused"
    assert choice.rejected == (
        "unmeasured: its speed on cpu has not been measured; kernels.use=rope=unmeasured takes it",
    )
    assert first_willing((eager,), CPU, torch.float32, "unmeasured")[0] is eager


def test_every_operation_of_the_table_is_described() -> None:
    assert list(OPERATIONS) == list(dict.fromkeys(kernel.operation for kernel in TABLE))


def test_the_config_reads_the_rows_as_they_are() -> None:
    called = {field.name for field in fields(Kernels)} | {OPTIMIZER}
    rows = (*TABLE, transformer_engine.MODULES)
    assert backends() == {
        operation: tuple(kernel.backend for kernel in rows if kernel.operation == operation)
        for operation in OPERATIONS
        if operation in called
    }


def test_of_every_backend_there_is_a_reason() -> None:
    _, choices = resolve(CPU, torch.float32)
    _, adam = adamw.choose(CPU, torch.float32, torch.float32)
    lines = explain(CPU, torch.float32, (*choices, adam))
    for choice, line in zip((*choices, adam), lines, strict=True):
        assert line.startswith(f"{choice.operation} ({choice.backend})")
        for kernel in TABLE:
            taken = choice.backend.partition(" ")[0]
            if kernel.operation == choice.operation and kernel.backend != taken:
                assert f"; not {kernel.backend}: " in line
    _, choices_named = resolve(CPU, torch.float32, {"rope": "reference"})
    (named,) = (line for line in explain(CPU, torch.float32, choices_named) if line.startswith("rope ("))
    others = "; ".join(f"not {each}: kernels.use names another" for each in ("fused", "cuda", "triton"))
    assert named == f"rope (reference); {others}"
    (rms_norm,) = (line for line in lines if line.startswith("rms_norm ("))
    (taken,) = (choice.backend for choice in choices if choice.operation == "rms_norm")
    assert rms_norm.endswith(f"; not reference: {taken} comes first")
    assert "not apex: no CUDA device" in rms_norm


def test_of_every_package_it_is_said_whether_it_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable", lambda: "it is not built")
    lines = packages()
    names = ["transformer-engine", "apex", "triton", "csrc/cpu", "csrc/cuda"]
    assert [line.partition(":")[0] for line in lines] == names
    assert lines[-2] == "csrc/cpu: it is not built"
    monkeypatch.setattr(native, "unavailable", lambda: "")
    assert packages()[-2] == "csrc/cpu: found"
    if not torch.cuda.is_available():
        assert lines[0] == "transformer-engine: no CUDA device"


def test_strangers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kernels: \['conv'\] are not operations; there are \['linear', 'rms_norm'"):
        resolve(CPU, torch.float32, {"conv": "reference"})
    with pytest.raises(ValueError, match="kernels: no rope for .*: no backend 'metal'"):
        resolve(CPU, torch.float32, {"rope": "metal"})
