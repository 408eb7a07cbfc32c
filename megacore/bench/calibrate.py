"""`megacore bench calibrate`: how fast this machine does what training consists of, for the planner.

Products of matrices, attention, operations that memory bounds, copies, the overhead of a call, and collectives and
messages between ranks. On CPUs a rank has one core while it is measured alone, and collectives are timed among as many
processes as ranks, so that what they cost where processes outnumber cores is part of their time.

The CUDA path (one process per GPU, NCCL) is written and has never been run.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megacore.bench.train import SHAPE
from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.config.schema import ParallelConfig, RunConfig
from megacore.kernels import table
from megacore.kernels.fused import attention
from megacore.kernels.table import Kernels
from megacore.layout.layout import Layout
from megacore.mesh import process_group
from megacore.mesh.collectives import all_gather, all_reduce, all_to_all, barrier, reduce_scatter
from megacore.mesh.group import Group, Message
from megacore.mesh.mesh import ParallelMesh
from megacore.mesh.messages import exchange_start
from megacore.mesh.rank_info import RankInfo
from megacore.model.inputs import Inputs
from megacore.train.build import build

DTYPES = MappingProxyType({"fp32": torch.float32, "bf16": torch.bfloat16})

SAMPLE_S = 0.02
"""What is shorter is repeated within a sample, until it lasts this long."""

COLD_BYTES = 1 << 27
"""Collectives take turns among tensors of this size together: what they send in training is not in a cache."""
MOST_TENSORS = 64


@dataclass(frozen=True)
class Point:
    """One measurement: ``what`` (gemm, attention, norm, copy, call, all_reduce, ...) of ``sizes``, in ``seconds``.

    ``flops`` and ``num_bytes`` are what is computed and what has to pass through memory, or, of collectives, the whole
    tensor's bytes; ``ranks`` work together; ``threads`` are each one's.
    """

    what: str
    dtype: str
    sizes: tuple[int, ...]
    seconds: float
    flops: float = 0.0
    num_bytes: float = 0.0
    ranks: int = 1
    threads: int = 1


def timed(call: Callable[[], object], device: torch.device, samples: int = 5, clock: Any = time.perf_counter) -> float:
    """Seconds of a call: the best of ``samples``. Others' work on the machine only ever makes it slower."""
    for _ in range(2):
        call()
    _settle(device)
    start = clock()
    call()
    _settle(device)
    number = max(1, min(1000, int(SAMPLE_S / max(clock() - start, 1e-9))))
    best = float("inf")
    for _ in range(samples):
        start = clock()
        for _ in range(number):
            call()
        _settle(device)
        best = min(best, (clock() - start) / number)
    return best


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gemm_sizes(device: torch.device) -> list[tuple[int, int, int]]:
    """(m, n, k) of products [m, k] x [k, n]: tokens, outputs, inputs of layers, thin ones (of much tp) among them."""
    if device.type == "cuda":
        hidden, tokens = (1024, 2048, 4096, 8192), (1024, 4096, 16384)
        return [(t, n, k) for t in tokens for k in hidden for n in (k // 8, k, 4 * k)]
    return [
        (t, n, k) for t in (64, 256, 1024) for n, k in ((64, 256), (256, 64), (256, 256), (1024, 256), (1024, 1024))
    ]


def alone(device: torch.device, dtypes: Sequence[str], say: Callable[[str], object]) -> Iterator[Point]:
    """All that one rank does by itself."""
    threads = torch.get_num_threads()
    for name in dtypes:
        dtype = DTYPES[name]
        kernels, _ = table.resolve(device, dtype)
        say(f"products, attention and the rest in {name} ...\n")
        yield from _products(device, name, kernels, threads)
        yield from _attention(device, name, threads)
        yield from _bound_by_memory(device, name, kernels, threads)
    yield from _calls(device, threads)


def _products(device: torch.device, name: str, kernels: Kernels, threads: int) -> Iterator[Point]:
    dtype = DTYPES[name]
    for m, n, k in gemm_sizes(device):
        x, weight = torch.randn(m, k, dtype=dtype, device=device), torch.randn(n, k, dtype=dtype, device=device)
        grad = torch.randn(m, n, dtype=dtype, device=device)
        into = torch.zeros(n, k, dtype=torch.float32, device=device)
        flops, size = 2.0 * m * n * k, x.element_size() * (m * k + n * k + m * n)
        for what, call in (
            ("gemm", lambda x=x, weight=weight: kernels.linear.forward(x, weight)),
            ("gemm_dgrad", lambda grad=grad, weight=weight: kernels.linear.dgrad(grad, weight)),
            ("gemm_wgrad", lambda into=into, x=x, grad=grad: kernels.linear.wgrad(into, x, grad)),
        ):
            yield Point(what, name, (m, n, k), timed(call, device), flops, size, threads=threads)


def _attention(device: torch.device, name: str, threads: int) -> Iterator[Point]:
    dtype = DTYPES[name]
    shapes = [(1, 32, 2048, 128), (1, 8, 8192, 128)] if device.type == "cuda" else [(4, 4, 128, 32), (1, 8, 512, 64)]
    for b, n, s, d in shapes:
        q, k, v = (torch.randn(b, n, s, d, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
        grad = torch.randn(b, n, s, d, dtype=dtype, device=device)
        flops = 2.0 * b * n * s * s * d  # causal: half of 4
        size = 4.0 * q.numel() * q.element_size()

        def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return attention(q, k, v, None, True, q.shape[-1] ** -0.5)

        with torch.no_grad():
            yield Point("attention", name, (b, n, s, d), timed(forward, device), flops, size, threads=threads)

        def both(forward: Callable[[], Tensor] = forward, grad: Tensor = grad) -> None:
            forward().backward(grad)

        yield Point(
            "attention_with_backward", name, (b, n, s, d), timed(both, device), 3.5 * flops, 3 * size, threads=threads
        )


def _bound_by_memory(device: torch.device, name: str, kernels: Kernels, threads: int) -> Iterator[Point]:
    dtype = DTYPES[name]
    rows, h = (8192, 4096) if device.type == "cuda" else (1024, 512)
    x, weight = torch.randn(rows, h, dtype=dtype, device=device), torch.ones(h, dtype=dtype, device=device)
    size = x.numel() * x.element_size()
    target, other = torch.empty_like(x), torch.randn_like(x)
    with torch.no_grad():
        calls: tuple[tuple[str, Callable[[], object], float], ...] = (
            ("copy", lambda: target.copy_(x), 2 * size),
            ("add", lambda: torch.add(x, other, out=target), 3 * size),
            ("norm", lambda: kernels.rms_norm(x, weight, 1e-5), 2 * size),
            ("swiglu", lambda: kernels.swiglu(x), 1.5 * size),
        )
        for what, call, moved in calls:
            yield Point(what, name, (rows, h), timed(call, device), num_bytes=moved, threads=threads)
    if name == "fp32":
        weights, grads, first, second = (torch.rand(rows * h, device=device) for _ in range(4))
        clock, taken = torch.ones((), device=device), torch.zeros((), device=device)
        step = lambda: torch._fused_adamw_(  # noqa: E731
            [weights],
            [grads],
            [first],
            [second],
            [],
            [clock],
            lr=1e-3,
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
            found_inf=taken,
        )
        with torch.no_grad():
            yield Point("adamw", name, (rows * h,), timed(step, device), num_bytes=28.0 * rows * h, threads=threads)


def _calls(device: torch.device, threads: int) -> Iterator[Point]:
    """The overhead of a call: of an operation with next to nothing to do, and of one with its backward."""
    tiny = torch.ones(8, device=device)
    with torch.no_grad():
        yield Point("call", "fp32", (8,), timed(lambda: F.silu(tiny), device), threads=threads)
    leaf = torch.ones(8, device=device, requires_grad=True)
    grad = torch.ones(8, device=device)
    yield Point("call_with_backward", "fp32", (8,), timed(lambda: F.silu(leaf).backward(grad), device), threads=threads)


def measure_alone(
    info: RankInfo, name: str, device_kind: str, dtypes: Sequence[str], threads: int, result: str
) -> None:
    """One process' part; writes its points to the JSON file ``result``."""
    device = process_group.device_of(info, device_kind)
    torch.set_num_threads(threads)
    points = [*alone(device, dtypes, lambda text: None), *_step(info, device, threads)]
    Path(result).write_text(json.dumps([asdict(point) for point in points]))


def measure_together(
    info: RankInfo, name: str, device_kind: str, sizes: Sequence[int], rounds: int, result: str
) -> None:
    """Collectives of ``sizes`` bytes among all ranks: the slowest rank's median of ``rounds``; rank 0 writes."""
    torch.set_num_threads(1)
    device = process_group.device_of(info, device_kind)
    process_group.start(info, device)
    try:
        points = list(collectives(info, device, sizes, rounds))
    finally:
        process_group.stop()
    if info.rank == 0:
        Path(result).write_text(json.dumps([asdict(point) for point in points]))


def collectives(info: RankInfo, device: torch.device, sizes: Sequence[int], rounds: int) -> Iterator[Point]:
    """The points of all ranks, which must have met."""
    world = ParallelMesh.build(Layout(dp=info.world_size, dp_shard=info.world_size), info.rank, device).world
    for size in sizes:
        numel = max(info.world_size, size // 4 // info.world_size * info.world_size)
        number = min(MOST_TENSORS, max(1, COLD_BYTES // size))
        wholes = [torch.ones(numel, device=device) for _ in range(number)]
        parts = [whole[: numel // info.world_size] for whole in wholes]
        for what, call in (
            ("all_reduce", lambda turn, wholes=wholes: all_reduce(wholes[turn], world)),
            ("all_gather", lambda turn, parts=parts: all_gather(parts[turn], world)),
            ("reduce_scatter", lambda turn, wholes=wholes: reduce_scatter(wholes[turn], world)),
            ("all_to_all", lambda turn, wholes=wholes: all_to_all(wholes[turn], world)),
            ("send", lambda turn, wholes=wholes: _ring(wholes[turn], world)),
        ):
            seconds = _slowest(call, number, world, device, rounds)
            yield Point(what, "fp32", (numel,), seconds, num_bytes=4.0 * numel, ranks=info.world_size)


def _ring(x: Tensor, world: Group) -> None:
    """Everybody sends x to the next one."""
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    tag = world.next_tag()
    pending = exchange_start([Message(x, after, tag)], [Message(torch.empty_like(x), before, tag)], world)
    for each in pending:
        each.wait()


def _slowest(call: Callable[[int], object], number: int, world: Group, device: torch.device, rounds: int) -> float:
    """Of every round the slowest rank's seconds; of those the median. The call is told which of ``number`` tensors is
    its turn."""
    seconds = torch.zeros(rounds, dtype=torch.float64, device=device)
    for turn in range(-2, rounds):
        barrier(world)
        start = time.perf_counter()
        call(turn % number)
        _settle(device)
        if turn >= 0:
            seconds[turn] = time.perf_counter() - start
    return float(all_reduce(seconds, world, "max").median())


def reference_run() -> RunConfig:
    """A small Llama on one process, of which a whole step is timed: what parts measured by themselves, with all they
    need in caches, leave out."""
    config = load(None, SHAPE)
    return resolve(replace(config, parallel=ParallelConfig(dp=1)), 1)


def _step(info: RankInfo, device: torch.device, threads: int) -> Iterator[Point]:
    config = reference_run()
    trainer = build(config, info, device).trainer
    t = config.train
    inputs = [made_up_inputs(config, device) for _ in range(t.global_batch_size // t.micro_batch_size)]
    seconds = timed(lambda: trainer.step(inputs, t.global_batch_size * t.seq_len, 1e-3), device)
    sizes = (t.global_batch_size, t.seq_len)
    yield Point("step", config.precision.dtype, sizes, seconds, threads=threads)


def made_up_inputs(config: RunConfig, device: torch.device) -> Inputs:
    """A microbatch of random tokens."""
    shape = config.train.micro_batch_size, config.train.seq_len + 1
    text = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    ordinal_b = torch.arange(shape[0], device=device)
    return Inputs(text[:, :-1].contiguous(), text[:, 1:].contiguous(), ordinal_b)


def points_of(path: Path) -> list[Point]:
    """What a process has written."""
    return [Point(**{**one, "sizes": tuple(one["sizes"])}) for one in json.loads(path.read_text())]
