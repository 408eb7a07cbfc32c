"""Our CUDA kernels as operations of torch: what torch's own checks say of each, and what the table's small examples do
not reach: whole vectors, rows that no register holds, more rows than blocks, more tensors than a launch takes.

They need a library of csrc/cuda: the emulated one, with which test_cuda.py starts a process, or on a GPU the real one.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megacore.kernels import adamw, reference
from megacore.kernels.adamw import Moments, Rates
from megacore.kernels.cuda import library
from megacore.kernels.operations import OPERATIONS, TOLERANCES, Arguments, cast, numbers, tensors_of
from megacore.kernels.table import TABLE

OURS = [kernel for kernel in TABLE if kernel.backend == "cuda"]

pytestmark = pytest.mark.skipif(
    not library.loaded() and bool(library.unavailable()), reason="csrc/cuda is not built (test_cuda.py emulates it)"
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run: the emulated device, or a GPU."""
    device = torch.device(request.param)
    if reason := library.refuses(device, torch.float32):
        pytest.skip(reason)
    return device


def float32(*shape: int) -> Tensor:
    return numbers(*shape).float().requires_grad_()


def calls() -> Iterator[tuple[str, Callable[[], tuple[Any, ...]]]]:
    """Every operation with arguments."""
    x, weight, inverse = (lambda: float32(3, 6)), (lambda: float32(6)), (lambda: torch.rand(3))
    angle = numbers(1, 3, 1, 4).float()
    turned = (angle.cos(), angle.sin(), True, False)
    scores, mask = (lambda: float32(2, 2, 3, 5)), torch.rand(2, 1, 3, 5) < 0.5
    detached = lambda *shape: float32(*shape).detach()  # noqa: E731
    yield "rms_norm", lambda: (x(), weight(), 1e-5, 0.0)
    yield "rms_norm_add", lambda: (x(), x(), weight(), 1e-5, 1.0)
    yield "rms_norm_backward", lambda: (detached(3, 6), None, detached(3, 6), detached(6), inverse(), 0.0)
    yield "layer_norm", lambda: (x(), weight(), weight(), 1e-5)
    yield "layer_norm_add", lambda: (x(), x(), weight(), weight(), 1e-5)
    backward = lambda: (*(detached(3, 6) for _ in range(3)), detached(6), inverse(), inverse())  # noqa: E731
    yield "layer_norm_backward", backward
    yield "gated", lambda: (x(), "silu")
    yield "gated_backward", lambda: (detached(3, 3), detached(3, 6), "gelu")
    yield "bias_gelu", lambda: (x(), weight())
    yield "bias_gelu_backward", lambda: (detached(3, 6), detached(3, 6), detached(6))
    yield "rope", lambda: (float32(2, 3, 2, 8), *turned)
    yield "rope_", lambda: (detached(2, 3, 2, 8), *turned)
    yield "softmax", lambda: (scores(), mask, True, 0.5)
    yield "softmax_backward", lambda: (detached(2, 2, 3, 5), torch.rand(2, 2, 3, 5), 0.5)
    yield "logit_statistics", lambda: (detached(3, 6), torch.tensor([0, 7, 5]))
    yield "squares", lambda: ([detached(3, 6), detached(6)],)
    yield "quantise", lambda: (detached(3, 6), torch.tensor(2.0), False)
    lists = lambda: ([torch.rand(9)] for _ in range(4))  # noqa: E731
    clock = lambda: (torch.tensor(2.0), torch.tensor(1.0))  # noqa: E731
    yield "adamw_", lambda: (*lists(), [], *clock(), [0.1], [0.1], False, 0.9, 0.95, 1e-8)


CALLS = dict(calls())


def operations() -> set[str]:
    """What the library has registered, without what it says of itself."""
    OURS[0].loaded  # noqa: B018 - importing registers fakes
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("megacore_cuda::")]
    return {name.partition("::")[2] for name in names} - {"interface", "emulated"}


def test_every_operation_is_known_to_torch() -> None:
    """Each has a schema, a kernel for its device, and a fake twin."""
    key = "CPU" if library.emulated() else "CUDA"
    assert operations() == set(CALLS)
    for name in operations():
        full = f"megacore_cuda::{name}"
        assert getattr(torch.ops.megacore_cuda, name).default._schema.name == full
        assert torch._C._dispatch_has_kernel_for_dispatch_key(full, key), name
        assert torch._library.simple_registry.singleton.find(full).fake_impl.kernel is not None, name


@pytest.mark.parametrize("name", CALLS)
def test_torch_finds_no_fault(name: str, device: torch.device) -> None:
    """Its schema says what is written, its fake twin gives the same shapes, its gradients go through torch.compile."""
    assert operations()
    torch.manual_seed(0)
    arguments = on(CALLS[name](), device)
    torch.library.opcheck(getattr(torch.ops.megacore_cuda, name).default, arguments)


def on(argument: Any, device: torch.device) -> Any:
    if isinstance(argument, Tensor):
        return argument.detach().to(device).requires_grad_(argument.requires_grad)
    return type(argument)(on(each, device) for each in argument) if isinstance(argument, (list, tuple)) else argument


def rotation(b: int, s: int, n: int, d: int, pairs: int) -> Arguments:
    angle = 9 * numbers(b, s, 1, pairs)
    return numbers(b, s, n, d), angle.cos(), angle.sin()


def scores(q: int, k: int, masked: bool) -> Arguments:
    mask = torch.rand(2, 1, q, k) < 0.6
    return 4 * numbers(2, 1, q, k), mask if masked else None, not masked, 0.7


def larger() -> Iterator[tuple[str, Callable[[], Arguments]]]:
    """In whole vectors unless the width is odd; wide enough for a block of threads, and more than registers hold."""
    for rows, width in ((5, 64), (3, 1032), (2, 1100), (2, 9000), (700, 8), (3100, 4)):
        yield "rms_norm", lambda r=rows, w=width: (numbers(r, w), numbers(w), 1e-5)
        yield "layer_norm", lambda r=rows, w=width: (1 + numbers(r, w), numbers(w), numbers(w), 1e-5)
    for rows, width in ((3, 1032), (2, 9000), (2, 1101)):
        yield "rms_norm_add", lambda r=rows, w=width: (numbers(r, w), numbers(r, w), numbers(w), 1e-5, 1.0)
        yield "layer_norm_add", lambda r=rows, w=width: (*(numbers(r, w) for _ in "xr"), numbers(w), numbers(w), 1e-5)
    yield "layer_norm", lambda: (numbers(390, 1040), numbers(1040), numbers(1040), 1e-5)
    yield "layer_norm", lambda: (numbers(2, 12312), numbers(12312), numbers(12312), 1e-5)  # beyond shared memory
    for name in ("rope", "rope_interleaved"):
        yield name, lambda: rotation(2, 3, 2, 64, 32)
        yield name, lambda: rotation(1, 5, 3, 48, 16)  # the last 16 dims stay
        yield name, lambda: rotation(2, 3, 1, 1200, 520)
    for name in ("swiglu", "geglu"):
        yield name, lambda: (3 * numbers(3, 2, 1040),)
        yield name, lambda: (3 * numbers(2, 6000),)
    yield "bias_gelu", lambda: (3 * numbers(3, 1032), numbers(1032))
    yield "bias_gelu", lambda: (3 * numbers(400, 2056), numbers(2056))
    yield "bias_gelu", lambda: (3 * numbers(1000, 16), numbers(16))
    for masked in (False, True):
        yield "softmax", lambda m=masked: scores(3, 1040, m)
        yield "softmax", lambda m=masked: scores(2, 8208, m)
        yield "softmax", lambda m=masked: scores(2, 1101, m)
    yield "logit_statistics", lambda: (5 * numbers(2, 33_000), torch.tensor([32_999, -1]))
    yield "logit_statistics", lambda: (5 * numbers(5, 4099), torch.randint(4099, (5,)))
    yield "squares", lambda: ([numbers(size % 7 * 300) for size in range(600)],)
    yield "squares", lambda: ([numbers(70_001), numbers(5, 7)],)
    yield "quantise", lambda: (numbers(3, 5001), torch.tensor(4.0), False)
    yield "quantise", lambda: (numbers(4099), torch.tensor(4096.0), True)


LARGER = tuple(larger())


def compare(got: Tensor, want: Tensor, tolerance: float) -> None:
    """In terms of the largest number that is wanted: some are sums over thousands."""
    got, want = got.double().cpu(), want.double().cpu()
    bound = tolerance * max(1.0, want.abs().max().item() if want.numel() else 1.0)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=bound)


def outcome(function: Any, name: str, args: Arguments) -> list[Tensor]:
    """Results and gradients."""
    places = OPERATIONS[name].with_grad
    inputs = [args[place].detach().requires_grad_() for place in places]
    args = tuple(inputs[places.index(i)] if i in places else arg for i, arg in enumerate(args))
    results = tensors_of(function(*args))
    weights = [torch.linspace(-1, 2, each.numel()).to(each).view(each.shape) for each in results]
    return results + (list(torch.autograd.grad(results, inputs, weights)) if places else [])


@pytest.mark.parametrize("dtype", library.FLOATS, ids=str)
@pytest.mark.parametrize("case", range(len(LARGER)), ids=lambda case: f"{LARGER[case][0]}-{case}")
def test_larger_tensors(case: int, dtype: torch.dtype, device: torch.device) -> None:
    """Against the reference in float64; twice with the same bits, whatever the order of threads."""
    name, make = LARGER[case]
    torch.manual_seed(case)
    (kernel,) = (kernel for kernel in OURS if kernel.operation == name)
    args = cast(make(), dtype, device)
    wide = tuple(
        arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dim() else arg for arg in args
    )
    if name == "squares":
        wide = ([each.double() for each in args[0]],)
    gots, wants = outcome(kernel.loaded, name, args), outcome(OPERATIONS[name].reference, name, wide)
    for got, want, again in zip(gots, wants, outcome(kernel.loaded, name, args), strict=True):
        assert torch.equal(got.flatten().view(torch.uint8), again.flatten().view(torch.uint8))
        compare(got, want, OPERATIONS[name].tolerance[dtype] if name == "quantise" else TOLERANCES[dtype])


@pytest.mark.parametrize("moment", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", library.FLOATS, ids=str)
def test_a_step_of_many_runs(grad: torch.dtype, moment: torch.dtype, device: torch.device) -> None:
    """More runs than a launch takes, some empty, some that begin within 16 bytes; with bf16 copies."""
    torch.manual_seed(0)
    sizes = [place % 9 for place in range(270)] + [9001, 4096, 12_288, 5]

    def lists(scale: float, dtype: torch.dtype) -> list[Tensor]:
        flat = (scale * torch.rand(sum(sizes), device=device)).to(dtype)
        return list(flat.split(sizes))

    own = [lists(1, torch.float32), lists(1, grad), lists(1e-2, moment), lists(1e-4, moment), lists(0, torch.bfloat16)]
    other = [[each.clone() for each in group] for group in own]
    places = range(len(sizes))
    rates = Rates([1e-3 * (i % 5) for i in places], [0.1 * (i % 2) for i in places], 0.9, 0.95, 1e-8)
    (kernel,) = (kernel for kernel in OURS if kernel.operation == "adamw")
    clock, taken = torch.tensor(3.0, device=device), torch.tensor(1.0, device=device)
    for function, (weights, grads, first, second, copies) in ((kernel.loaded, own), (adamw.reference, other)):
        function(weights, grads, Moments(first, second, clock), rates, taken, copies)
    for ours, theirs in zip(own, other, strict=True):
        rtol = 2e-5 if ours[0].dtype == torch.float32 else 1e-2
        torch.testing.assert_close(torch.cat(ours), torch.cat(theirs), rtol=rtol, atol=1e-7)
    before = [each.clone() for group in own for each in group]
    weights, grads, first, second, copies = own
    kernel.loaded(weights, grads, Moments(first, second, clock + 1), rates, 0 * taken, copies)
    assert all(map(torch.equal, before, [each for group in own for each in group]))  # a step that is not taken


def test_rope_turns_in_place_and_back(device: torch.device) -> None:
    """Also where x is a part of a larger tensor; the rest of that is left alone."""
    rope_ = torch.ops.megacore_cuda.rope_
    assert operations()
    torch.manual_seed(0)
    whole = numbers(2, 5, 9, 16).float().to(device)
    x, before, angle = whole[:, :, 2:5], whole.clone(), numbers(1, 5, 1, 8).float().to(device)
    cos, sin = angle.cos(), angle.sin()
    for apart, turn in ((True, reference.rope), (False, reference.rope_interleaved)):
        want = turn(x, cos, sin)
        rope_(x, cos, sin, apart, False)
        torch.testing.assert_close(x, want, rtol=1e-5, atol=1e-5)
        rope_(x, cos, sin, apart, True)
        torch.testing.assert_close(whole, before, rtol=1e-5, atol=1e-5)
    assert torch.equal(whole[:, :, :2], before[:, :, :2]) and torch.equal(whole[:, :, 5:], before[:, :, 5:])


def test_what_is_not_a_number_stays_one(device: torch.device) -> None:
    from megacore.kernels.cuda import operations as ours

    x = torch.tensor([[torch.nan, 1.0, 2.0, 3.0], [1.0, torch.inf, 0.0, -torch.inf]], device=device)
    assert ours.rms_norm(x, torch.ones(4, device=device), 1e-5)[0].isnan().all()
    assert ours.swiglu(x)[0, 0].isnan()
    largest, sums, _ = ours.logit_statistics(x, torch.zeros(2, dtype=torch.long, device=device))
    assert largest[0].isnan() and sums[0, 0].isnan() and largest[1] == torch.inf
    assert ours.softmax(x[None, None, :1], None, False, 1.0).isnan().all()
    _, amax = ours.quantise(x, torch.ones((), device=device), False)
    assert amax.isnan()
    assert ours.squares([x, x[1:, :1]])[0].isnan()


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    ops = torch.ops.megacore_cuda
    assert operations()
    x, weight = torch.rand(3, 8, device=device), torch.rand(8, device=device)
    heads, angle = torch.rand(1, 3, 2, 8, device=device), torch.rand(1, 3, 1, 4, device=device)
    scores = torch.rand(1, 2, 3, 4, device=device)
    one = torch.ones((), device=device)
    rest = (one, one, [0.1], [0.1], False, 0.9, 0.95, 1e-8)
    for match, call in (
        ("x is Double; these kernels are for float32", lambda: ops.rms_norm(x.double(), weight, 1e-5, 0.0)),
        ("weight is BFloat16.*must be, as the first", lambda: ops.rms_norm(x, weight.bfloat16(), 1e-5, 0.0)),
        ("weight has 7 elements.*one row of 8", lambda: ops.rms_norm(x, weight[1:], 1e-5, 0.0)),
        ("residual must have the shape", lambda: ops.rms_norm_add(x, x[1:], weight, 1e-5, 0.0)),
        ("x is a single number", lambda: ops.rms_norm(one, weight, 1e-5, 0.0)),
        ("rows of 7 cannot be halved", lambda: ops.gated(x[:, 1:], "silu")),
        ("activation 'tanh' is neither", lambda: ops.gated(x, "tanh")),
        ("cos and sin must be", lambda: ops.rope(heads, angle[:, :2], angle[:, :2], True, False)),
        ("heads lie in one piece", lambda: ops.rope_(heads.transpose(2, 3), angle, angle, True, False)),
        ("mask of 5 in dim 0", lambda: ops.softmax(scores, torch.ones(5, device=device) > 0, False, 1.0)),
        ("mask must be boolean", lambda: ops.softmax(scores, scores, False, 1.0)),
        ("int64 targets", lambda: ops.logit_statistics(x, torch.zeros(2, dtype=torch.long, device=device))),
        ("scale must be 1 contiguous float32", lambda: ops.quantise(x, torch.ones(2, device=device), False)),
        (r"grads\[0\] must be contiguous", lambda: ops.adamw_([weight], [x[:, 0]], [weight], [weight], [], *rest)),
        (r"copies\[0\] must be .*BFloat16", lambda: ops.adamw_(*([weight],) * 5, *rest)),
        ("lists of different lengths", lambda: ops.adamw_([weight], [], [weight], [weight], [], *rest)),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=match):
            call()
