"""What each operation of the table means, on what it is tested and timed, and what it has to move and compute.

Arguments are made in float64 on the CPU (``cast`` brings them elsewhere): numbers that are not floating point, and
float32 ones, stay as they are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megacore.kernels import adamw, reference
from megacore.kernels.adamw import Moments, Rates
from megacore.kernels.linear import REFERENCE, LinearKernel

Arguments = tuple[Any, ...]

TOLERANCES = MappingProxyType({torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 8e-3})
"""Largest error, relative or absolute, against the reference in float64 of the same (rounded) arguments."""

EXACT = MappingProxyType(dict.fromkeys(TOLERANCES, 0.0))
WIDE_ONLY = MappingProxyType({dtype: TOLERANCES[dtype] for dtype in (torch.float64, torch.float32)})


def call(function: Any, *args: Any) -> Any:
    """As it stands in ``reference``."""
    return function(*args)


@dataclass(frozen=True)
class Operation:
    """One operation.

    ``examples`` are for tests: small, odd and empty. ``sample`` (tokens, hidden size) is for timing. ``call``
    (function, *arguments) gives the results: a tensor, or a tuple of them. ``with_grad`` are the places of arguments
    that have gradients. ``saved`` is what a backward must read besides the gradient: its "inputs", its "outputs" or
    "nothing".
    ``flops`` are per element of the first argument, forward and backward; of products, a function of the
    arguments.
    """

    name: str
    reference: Any
    examples: Callable[[], Iterator[Arguments]]
    sample: Callable[[int, int], Arguments]
    with_grad: tuple[int, ...] = (0,)
    call: Callable[..., Any] = call
    tolerance: Mapping[torch.dtype, float] = field(default_factory=lambda: TOLERANCES)
    saved: str = "inputs"
    flops: tuple[float, float] | Callable[..., tuple[float, float]] = (4.0, 8.0)
    in_place: bool = False
    """It writes into its arguments, which are contiguous, and these are its results."""


@dataclass(frozen=True)
class Work:
    """What must be moved (bytes) and computed: nothing is read or written twice."""

    forward_bytes: int
    backward_bytes: int
    forward_flops: float
    backward_flops: float


def cast(argument: Any, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """An argument with its float64 tensors in ``dtype``, all on ``device``."""
    if isinstance(argument, Tensor):
        return argument.to(device, dtype if argument.dtype == torch.float64 else argument.dtype)
    if isinstance(argument, (list, tuple)):
        return tuple(cast(each, dtype, device) for each in argument)
    return argument


def tensors_of(argument: Any) -> list[Tensor]:
    """All tensors of an argument, of a result, or of a tuple of them."""
    if isinstance(argument, Tensor):
        return [argument]
    return [tensor for each in argument for tensor in tensors_of(each)] if isinstance(argument, (list, tuple)) else []


def work_of(operation: Operation, args: Arguments, results: Sequence[Tensor]) -> Work:
    """Of one call with these arguments and results."""
    read, written = _bytes(tensors_of(args)), _bytes(results)
    has_backward = bool(operation.with_grad)
    saved = {"inputs": read, "outputs": written, "nothing": 0}[operation.saved]
    grads = _bytes([tensor for place in operation.with_grad for tensor in tensors_of(args[place])])
    if callable(operation.flops):
        forward, backward = operation.flops(*args)
    else:
        numel = sum(tensor.numel() for tensor in tensors_of(args[0]))
        forward, backward = (each * numel for each in operation.flops)
    return Work(
        read + written, saved + written + grads if has_backward else 0, forward, backward if has_backward else 0.0
    )


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def numbers(*shape: int) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(shape, dtype=torch.float64)


def _activations(*shapes: tuple[int, ...]) -> Callable[[], Iterator[Arguments]]:
    def examples() -> Iterator[Arguments]:
        for shape in ((1, 2), (5, 14), (3, 7, 22), (0, 6), *shapes):
            yield (3 * numbers(*shape),)

    return examples


def _rms_norms() -> Iterator[Arguments]:
    for shape in ((1, 1), (5, 7), (2, 3, 33), (0, 6)):
        yield numbers(*shape), numbers(shape[-1]), 1e-5
    yield 1e-4 * numbers(4, 9), numbers(9), 1e-5  # where eps counts
    yield numbers(2, 3, 7), numbers(7), 1e-5, 1.0  # what is learned is the difference from 1


def _rms_norms_of_sums() -> Iterator[Arguments]:
    for x, *rest in _rms_norms():
        yield x, numbers(*x.shape), *rest


def _layer_norms() -> Iterator[Arguments]:
    for shape in ((1, 2), (5, 7), (2, 3, 33), (0, 6)):
        yield 2 + numbers(*shape), numbers(shape[-1]), numbers(shape[-1]), 1e-5


def _layer_norms_of_sums() -> Iterator[Arguments]:
    for x, *rest in _layer_norms():
        yield x, numbers(*x.shape), *rest


def _rotations() -> Iterator[Arguments]:
    for b, s, n, d in ((1, 1, 1, 2), (2, 5, 3, 6), (3, 4, 1, 10), (1, 0, 2, 4)):
        for angles in (1, b):
            angle = 9 * numbers(angles, s, 1, d // 2)
            yield numbers(b, s, n, d), angle.cos(), angle.sin()
            yield numbers(b, s, n, d + 3), angle.cos(), angle.sin()  # the last three dims stay


def _biased() -> Iterator[Arguments]:
    for shape in ((1, 2), (5, 7), (3, 4, 33), (0, 6)):
        yield 3 * numbers(*shape), numbers(shape[-1])


def _attentions(dropping: bool, *more: float) -> Callable[[], Iterator[Arguments]]:
    def examples() -> Iterator[Arguments]:
        for b, n, m, s, d in ((1, 1, 1, 1, 2), (2, 6, 2, 7, 5), (2, 3, 1, 9, 8), (1, 4, 4, 5, 3)):
            q, k, v = numbers(b, n, s, d), numbers(b, m, s, d), numbers(b, m, s, d)
            seen = torch.rand(b, 1, s, s) < 0.5
            seen |= torch.eye(s, dtype=torch.bool)  # every token sees itself
            bias = torch.where(seen, numbers(1, n, s, s), -torch.inf)
            keep = ((torch.rand(b, n, s, s) < 0.7) / 0.7).double() if dropping else None
            for mask, causal in ((None, True), (None, False), (seen, False), (bias, False)):
                yield q, k, v, mask, causal, d**-0.5, keep, *more

    return examples


def _softcapped() -> Iterator[Arguments]:
    yield from _attentions(False, 0.7)()
    yield from _attentions(True, 0.7)()


def _scores() -> Iterator[Arguments]:
    for b, n, q, k in ((1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 9, 9), (0, 2, 3, 3)):
        mask = torch.rand(b, 1, q, k) < 0.6
        mask[..., 0, :] = False  # a query that sees nothing
        for seen, causal in ((None, False), (None, True), (mask, False), (mask, True)):
            yield 4 * numbers(b, n, q, k), seen, causal, 0.7


def _logits() -> Iterator[Arguments]:
    for t, v in ((1, 1), (5, 7), (3, 130), (0, 4), (4, 0)):
        yield 5 * numbers(t, v), torch.randint(-3, v + 3, (t,))
    yield numbers(2, 5), torch.tensor([2, -100])


def _lists() -> Iterator[Arguments]:
    yield ([numbers(*shape) for shape in ((1,), (7, 5), (0,), (3, 2, 4), (1100,))],)
    yield ([numbers(40_000)],)


def _quantised() -> Iterator[Arguments]:
    for gradient in (False, True):
        for scale in (1.0, 2.0**-9, 2.0**12):
            x = numbers(9, 33)
            x[0, :6] = torch.tensor([0.0, -0.0, 1e5, -1e5, 1e-3, 2.0**-9])
            yield x, torch.tensor(scale), gradient
        yield 2.0 ** torch.arange(-22, 17, dtype=torch.float64) * 1.0625, torch.tensor(1.0), gradient  # ties, too
        yield torch.tensor([1.0, torch.nan, -torch.inf, torch.inf]).double(), torch.tensor(2.0), gradient
        yield numbers(0, 3), torch.tensor(1.0), gradient


def _dropped() -> Iterator[Arguments]:
    for shape in ((1, 2), (5, 7), (3, 4, 33), (0, 6)):
        keep = (torch.rand(shape) < 0.7).float() / 0.7
        yield numbers(*shape), numbers(shape[-1]), numbers(*shape), keep


EXPERTS, CHOICES = 8, 2
"""Of mixtures that are timed."""


def _chosen() -> Iterator[Arguments]:
    for t, k, e, h in ((1, 1, 1, 3), (7, 2, 4, 5), (0, 2, 3, 4), (9, 3, 3, 33), (6, 1, 20, 2)):
        yield numbers(t, h), torch.rand(t, e).argsort(1)[:, :k], e


def _from_experts() -> Iterator[Arguments]:
    for x, choice, num_experts in _chosen():
        order, _ = reference.order_of(choice, num_experts)
        yield numbers(len(order), x.shape[1]), order, torch.rand(choice.shape, dtype=torch.float64)


def _grouped() -> Iterator[Arguments]:
    for counts, i, o in (([1], 1, 1), ([3, 0, 4], 6, 5), ([0, 0], 4, 3), ([16, 8, 0, 40], 16, 24), ([5, 2], 0, 3)):
        yield numbers(sum(counts), i), numbers(len(counts), o, i), torch.tensor(counts)


def _many_chosen(t: int, h: int) -> Arguments:
    return numbers(t, h), torch.rand(t, EXPERTS).argsort(1)[:, :CHOICES], EXPERTS


def _many_from_experts(t: int, h: int) -> Arguments:
    order, _ = reference.order_of(torch.rand(t, EXPERTS).argsort(1)[:, :CHOICES], EXPERTS)
    return numbers(t * CHOICES, h), order, torch.rand(t, CHOICES, dtype=torch.float64)


def _many_grouped(t: int, h: int) -> Arguments:
    return (
        numbers(t, h),
        numbers(EXPERTS, h, h),
        torch.full((EXPERTS,), t // EXPERTS) + (torch.arange(EXPERTS) < t % EXPERTS),
    )


def _grouped_flops(x: Tensor, weight: Tensor, counts: Tensor) -> tuple[float, float]:
    forward = 2.0 * x.shape[0] * weight[0].numel()
    return forward, 2 * forward


def _first(function: Any, *args: Any) -> Tensor:
    """The rows alone: all else is integers."""
    return function(*args)[0]


def _steps() -> Iterator[Arguments]:
    sizes = (1, 7, 1000, 0, 1025)
    for coupled in (False, True):
        for taken in (1.0, 0.0):
            state = [[numbers(size) for size in sizes] for _ in range(3)]
            state[1] = [1e-3 * grad for grad in state[1]]
            second = [1e-6 * torch.rand(size, dtype=torch.float64) for size in sizes]
            rates = Rates([3e-2, 6e-2, 3e-2, 3e-2, 9e-2], [0.1, 0.0, 0.1, 0.1, 0.1], 0.9, 0.95, 1e-8, coupled)
            yield state[0], state[1], state[2], second, torch.tensor(3.0), torch.tensor(taken), rates


def _step(
    function: Any,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    clock: Tensor,
    taken: Tensor,
    rates: Rates,
) -> tuple[Tensor, ...]:
    function(weights, grads, Moments(first, second, clock), rates, taken)
    return *weights, *first, *second


def _one_step(t: int, h: int) -> Arguments:
    weight, grad, first = (numbers(t * h) for _ in range(3))
    rates = Rates([1e-6], [0.1], 0.9, 0.95, 1e-8)
    return [weight], [grad], [first], [first.square()], torch.tensor(3.0), torch.tensor(1.0), rates


def _products() -> Iterator[Arguments]:
    for t, i, o in ((1, 1, 1), (5, 7, 3), (33, 18, 65), (4, 6, 0), (0, 6, 4), (4, 0, 6)):
        yield numbers(t, i), numbers(o, i), numbers(t, o), numbers(o, i)


def _product(kernel: LinearKernel, x: Tensor, weight: Tensor, grad: Tensor, into: Tensor) -> tuple[Tensor, ...]:
    """Forward, dgrad and wgrad."""
    y, grad_x = kernel.forward(x, weight), kernel.dgrad(grad, weight)
    kernel.wgrad(into, x, grad)
    return y, grad_x, into


def _product_flops(x: Tensor, weight: Tensor, grad: Tensor, into: Tensor) -> tuple[float, float]:
    return 6.0 * x.shape[0] * weight.numel(), 0.0


HEAD = 128
"""Size of heads that are timed."""


def _heads(t: int, h: int) -> Arguments:
    heads = max(1, h // HEAD)
    q, k, v = (numbers(1, heads, t, HEAD) for _ in range(3))
    return q, k, v, None, True, HEAD**-0.5


def _dropping_heads(t: int, h: int) -> Arguments:
    q, *rest = _heads(t, h)
    return q, *rest, (torch.rand(*q.shape[:2], t, t) < 0.9).double() / 0.9


def _attention_flops(q: Tensor, k: Tensor, *_: Any) -> tuple[float, float]:
    """Two products forward and five backward, of which a causal mask leaves half."""
    forward = 2.0 * q.numel() * k.shape[2]
    return forward, 2.5 * forward


def _turned(t: int, h: int) -> Arguments:
    angle = numbers(1, t, 1, HEAD // 2)
    return numbers(1, t, max(1, h // HEAD), HEAD), angle.cos(), angle.sin()


def _plain(t: int, h: int) -> Arguments:
    return (numbers(t, h),)


def _pair(t: int, h: int) -> Arguments:
    return (numbers(t, 2 * h),)


def _operations() -> Iterator[Operation]:
    r = reference
    yield Operation(
        "linear", REFERENCE, _products, lambda t, h: (numbers(t, h), numbers(h, h), numbers(t, h), numbers(h, h)),
        (), _product, flops=_product_flops,
    )  # fmt: skip
    norm = (5.0, 11.0)
    yield Operation(
        "rms_norm", r.rms_norm, _rms_norms, lambda t, h: (numbers(t, h), numbers(h), 1e-5), (0, 1), flops=norm
    )
    yield Operation(
        "rms_norm_add", r.rms_norm_add, _rms_norms_of_sums,
        lambda t, h: (numbers(t, h), numbers(t, h), numbers(h), 1e-5), (0, 1, 2), flops=norm,
    )  # fmt: skip
    yield Operation(
        "layer_norm", r.layer_norm, _layer_norms, lambda t, h: (numbers(t, h), numbers(h), numbers(h), 1e-5),
        (0, 1, 2), flops=norm,
    )  # fmt: skip
    yield Operation(
        "layer_norm_add", r.layer_norm_add, _layer_norms_of_sums,
        lambda t, h: (numbers(t, h), numbers(t, h), numbers(h), numbers(h), 1e-5), (0, 1, 2, 3), flops=norm,
    )  # fmt: skip
    yield Operation("rope", r.rope, _rotations, _turned, saved="nothing", flops=(3.0, 3.0))
    yield Operation("rope_interleaved", r.rope_interleaved, _rotations, _turned, saved="nothing", flops=(3.0, 3.0))
    yield Operation("swiglu", r.swiglu, _activations(), _pair, flops=(3.0, 6.0))
    yield Operation("geglu", r.geglu, _activations(), _pair, flops=(5.0, 9.0))
    yield Operation("gelu", r.gelu, _activations((3, 5)), _plain, flops=(9.0, 14.0))
    yield Operation("gelu_erf", r.gelu_erf, _activations((3, 5)), _plain, flops=(9.0, 14.0))
    yield Operation("relu2", r.relu2, _activations((3, 5)), _plain, flops=(2.0, 3.0))
    yield Operation(
        "bias_gelu", r.bias_gelu, _biased, lambda t, h: (numbers(t, h), numbers(h)), (0, 1), flops=(10.0, 16.0)
    )
    attend: dict[str, Any] = {"with_grad": (0, 1, 2), "flops": _attention_flops}
    yield Operation("attention", r.attention, _attentions(False), _heads, **attend)
    yield Operation("attention_dropout", r.attention, _attentions(True), _dropping_heads, **attend)
    yield Operation("attention_softcap", r.attention, _softcapped, lambda t, h: (*_heads(t, h), None, 50.0), **attend)
    yield Operation(
        "softmax", r.softmax, _scores, lambda t, h: (numbers(1, 1, t, h), None, False, 1.0), saved="outputs"
    )
    yield Operation(
        "logit_statistics", r.logit_statistics, _logits, lambda t, h: (numbers(t, h), torch.randint(h, (t,))), ()
    )
    yield Operation("squares", r.squares, _lists, lambda t, h: ([numbers(t, h)],), (), flops=(2.0, 0.0))
    yield Operation(
        "quantise", r.quantise, _quantised, lambda t, h: (numbers(t, h), torch.tensor(1.0), False), (),
        tolerance=EXACT,
    )  # fmt: skip
    yield Operation(
        "bias_dropout_add", r.bias_dropout_add, _dropped,
        lambda t, h: (numbers(t, h), numbers(h), numbers(t, h), (torch.rand(t, h) < 0.9).float() / 0.9), (0, 1, 2),
        flops=(3.0, 2.0),
    )  # fmt: skip
    yield Operation("permute", r.permute, _chosen, _many_chosen, (0,), _first, saved="nothing", flops=(0.0, 1.0))
    yield Operation("unpermute", r.unpermute, _from_experts, _many_from_experts, (0, 2), flops=(2.0, 3.0))
    yield Operation("grouped_product", r.grouped_product, _grouped, _many_grouped, (0, 1), flops=_grouped_flops)
    yield Operation("adamw", adamw.reference, _steps, _one_step, (), _step, WIDE_ONLY, flops=(14.0, 0.0), in_place=True)


OPERATIONS: Mapping[str, Operation] = MappingProxyType({each.name: each for each in _operations()})
"""By name, in the order of the table."""
