"""Every backend of every fused operation on this device: time, what it moves and computes, and how near that is to what
the device can do.

Generated from the table: what willing backends there are, and arguments of a size (`kernels.operations`). All sides of
an operation take turns (see `harness`), together with a plain copy; beside the backends there are the plain reference
compiled by torch.compile, and Liger's kernels where it is installed. An operation with a backward is timed twice:
forward, and forward and backward.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megacore.bench.harness import Comparison, alternate, comparison
from megacore.kernels.operations import HEAD, OPERATIONS, Arguments, Operation, Work, cast, tensors_of, work_of
from megacore.kernels.table import TABLE

COPY, COMPILED, LIGER = "copy", "torch.compile", "liger"
REFERENCES = ("reference", "torch")
"""How the table calls an operation's plain PyTorch; a linear kernel's is torch."""
FORWARD, BOTH = "forward", "forward and backward"
FORMATS = MappingProxyType({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16})
QUADRATIC = frozenset({"attention", "attention_dropout", "attention_softcap"})
"""Operations whose work grows with the square of the tokens; they get fewer."""
UNCOMPILED = frozenset({"linear", "adamw"})
"""Operations whose plain form is no function of tensors alone."""

Step = Callable[[], object]


@dataclass(frozen=True)
class Size:
    """What is timed: tokens, hidden size, format, device."""

    tokens: int
    hidden: int
    dtype: torch.dtype
    device: torch.device

    def of(self, name: str) -> tuple[int, int]:
        """(tokens, hidden size) for an operation."""
        return max(1, self.tokens // 8) if name in QUADRATIC else self.tokens, self.hidden


@dataclass(frozen=True)
class Roof:
    """What the device can do: bytes per second of a copy, read and written, and FLOP/s of a large matrix product."""

    bandwidth: float
    peak: float


@dataclass(frozen=True)
class Measured:
    """All sides of one operation and pass."""

    comparison: Comparison
    operation: str
    step: str
    reference: str
    num_bytes: float
    flops: float
    copied: float
    """Bytes that `copy` moves, read and written."""
    peak: float
    """FLOP/s of a large product, measured beforehand."""
    multiplies: bool
    """Whether it is made of products of matrices, which alone can reach the peak."""

    @property
    def roof(self) -> Roof:
        """The copy's bandwidth in this very comparison."""
        return Roof(self.copied / self.comparison.side(COPY).median, self.peak)

    def bandwidth(self, side: str) -> float:
        """Bytes per second that the operation needs, over a side's median."""
        return self.num_bytes / self.comparison.side(side).median

    def speed(self, side: str) -> float:
        """FLOP/s at a side's median."""
        return self.flops / self.comparison.side(side).median

    @property
    def is_bound_by_memory(self) -> bool:
        """Whether a perfect kernel would wait for memory rather than for arithmetic."""
        return not self.multiplies or self.num_bytes / self.roof.bandwidth >= self.flops / self.peak

    def share(self, side: str) -> float:
        """Of what the device can do: of the copy's bandwidth or of the product's peak."""
        return self.bandwidth(side) / self.roof.bandwidth if self.is_bound_by_memory else self.speed(side) / self.peak


def sizes(device: str, formats: Sequence[str] | None, tokens: int, hidden: int) -> list[Size]:
    """What the command line asks for; 0 and nothing stand for defaults. Raises ValueError for what cannot be."""
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ValueError("--device=cuda, but torch sees no CUDA device here; leave it out, or use --device=cpu")
    on = torch.device("cuda" if cuda and device != "cpu" else "cpu")
    names = formats or (("fp32", "bf16") if on.type == "cpu" else ("bf16",))
    if wrong := [name for name in names if name not in FORMATS]:
        raise ValueError(f"--dtype={wrong[0]} is not one of {', '.join(FORMATS)}")
    shape = (tokens or (16384 if on.type == "cuda" else 2048), hidden or (4096 if on.type == "cuda" else 2048))
    for name, number, least in (("tokens", shape[0], 1), ("hidden", shape[1], HEAD)):
        if number < least or (name == "hidden" and number % HEAD):
            raise ValueError(f"--{name}={number} must be at least {least}" + f", in steps of {HEAD}" * (least == HEAD))
    return [Size(*shape, FORMATS[name], on) for name in names]


def measure(name: str, size: Size, rounds: int, peak: float, compiles: bool = True) -> Iterator[Measured]:
    """Time an operation's backends; one result per pass. What cannot be had is said on stderr and left out."""
    operation = OPERATIONS[name]
    torch.manual_seed(0)
    args = cast(operation.sample(*size.of(name)), size.dtype, size.device)
    functions = dict(_functions(operation, args, size, compiles))
    reference = next(each for each in REFERENCES if each in functions)
    with torch.no_grad():
        results = tensors_of(operation.call(functions[reference], *args))
    work = work_of(operation, args, results)
    largest = max(tensors_of(args), key=lambda tensor: tensor.nbytes)
    for step in (FORWARD, BOTH) if operation.with_grad else (FORWARD,):
        sides: dict[str, Step] = {COPY: _copying(largest)}
        for side, function in functions.items():
            sides[side] = _stepping(operation, function, args, step == BOTH)
        if size.device.type == "cuda":
            sides = {side: _awaited(each) for side, each in sides.items()}
        seconds = alternate(sides, rounds, warmup=2)
        settings = {"tokens": size.of(name)[0], "hidden": size.hidden, "dtype": str(size.dtype).removeprefix("torch.")}
        settings |= {"threads": torch.get_num_threads()} if size.device.type == "cpu" else {}
        ours = next(iter(functions))
        yield Measured(
            comparison(f"{name}, {step}", ours, seconds, settings), name, step, reference,
            *_moved(work, step), 2.0 * largest.nbytes, peak, callable(operation.flops),
        )  # fmt: skip


def _moved(work: Work, step: str) -> tuple[float, float]:
    if step == FORWARD:
        return work.forward_bytes, work.forward_flops
    return work.forward_bytes + work.backward_bytes, work.forward_flops + work.backward_flops


def _functions(
    operation: Operation, args: Arguments, size: Size, compiles: bool
) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The sides by name, each tried once: willing backends in the table's order, torch.compile, Liger."""
    for kernel in TABLE:
        if kernel.operation == operation.name and not kernel.refuses(size.device, size.dtype):
            yield kernel.backend, kernel.loaded
    others: dict[str, Callable[..., Any]] = {}
    if compiles and operation.name not in UNCOMPILED:
        others[COMPILED] = torch.compile(operation.reference, dynamic=False)
    if size.device.type == "cuda" and (found := liger(operation.name)):
        others[LIGER] = found
    for name, function in others.items():
        try:
            _stepping(operation, function, args, bool(operation.with_grad))()
        except Exception as reason:  # compilers fail in ways of their own; the other sides are worth measuring
            sys.stderr.write(f"left out: {operation.name} by {name}: {str(reason).splitlines()[0]}\n")
        else:
            yield name, function


def liger(name: str) -> Callable[..., Any] | None:
    """Liger's kernel for an operation, in our signature, if it has one and is installed."""
    if find_spec("liger_kernel") is None:
        return None
    functions = import_module("liger_kernel.transformers.functional")
    known: Mapping[str, Callable[..., Any]] = {
        "rms_norm": lambda x, weight, eps: functions.liger_rms_norm(x, weight, eps),
        "layer_norm": lambda x, weight, bias, eps: functions.liger_layer_norm(x, weight, bias, eps),
        "swiglu": lambda x: functions.liger_swiglu(*x.chunk(2, -1)),
        "geglu": lambda x: functions.liger_geglu(*x.chunk(2, -1)),
    }
    return known.get(name)


def _stepping(operation: Operation, function: Callable[..., Any], args: Arguments, backward: bool) -> Step:
    """One call, with or without its backward; gradients are of random numbers."""
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return operation.call(function, *args)

        return forward
    inputs = [args[place].detach() for place in operation.with_grad]
    grads: list[Tensor] = []

    def both() -> object:
        own = list(args)
        leaves = [each.requires_grad_() for each in inputs]
        for place, leaf in zip(operation.with_grad, leaves):
            own[place] = leaf
        results = [each for each in tensors_of(operation.call(function, *own)) if each.requires_grad]
        if not grads:
            grads.extend(torch.randn_like(each) for each in results)
        return torch.autograd.grad(results, leaves, grads)

    return both


def _copying(source: Tensor) -> Step:
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def _awaited(step: Step) -> Step:
    def awaited() -> None:
        step()
        torch.cuda.synchronize()

    return awaited


def peak_of(size: Size, rounds: int = 5) -> float:
    """FLOP/s of the best of a few products of large matrices, by the fastest of the table's backends."""
    n = 8192 if size.device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=size.device).to(size.dtype) for _ in range(2))
    steps = {
        kernel.backend: partial(kernel.loaded.forward, a, b)
        for kernel in TABLE
        if kernel.operation == "linear" and not kernel.refuses(size.device, size.dtype)
    }
    on_gpu = size.device.type == "cuda"
    times = alternate({name: _awaited(step) if on_gpu else step for name, step in steps.items()}, rounds, warmup=2)
    return 2.0 * n**3 / min(min(each) for each in times.values())
