"""Times of layouts predicted from what `megacore bench calibrate` measured on this machine, for `bench layouts`.

Nothing is run: every operation and every collective of a step is taken from the engine itself, walked on the meta
device (`train.imagine`), and priced by the nearest measured points. The ranks of a layout share the machine's cores:

    time = max(the schedule with a core for each rank, all ranks' work / cores) + sums over data-parallel ranks

Parts of a step were measured by themselves, with what they need in caches. How much longer they take within a step is
one number, that of a small reference step on one core: measured / priced.

Points of collectives were measured among as many processes as ranks, so where those outnumber the cores each had but
its share of one: that share is the work which the second term counts.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megacore.bench.calibrate import Point, reference_run
from megacore.config.schema import RunConfig
from megacore.cost.simulate import Durations, simulate
from megacore.mesh.group import CommRecord
from megacore.spec.stages import flops_of_stages
from megacore.train.imagine import Imagination
from megacore.train.pipeline_overview import Pipeline

PRODUCTS = frozenset({"mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "_linear_pointwise"})
ADDED = frozenset({"addmm", "addmm_", "baddbmm"})
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
BACKWARD_FLOPS = 2.5
"""Of attention's forward: five products instead of two."""
OF_DATA = frozenset({"dp_cp", "dp_shard", "dp_replicate"})
"""Axes whose collectives come at the ends of backward and of the step; under ZeRO-3 in between."""
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")


@dataclass(frozen=True)
class Prices:
    """Seconds of operations and collectives by measured points; ``cores`` are the machine's."""

    points: tuple[Point, ...]
    cores: int

    @classmethod
    def read(cls, path: Path) -> "Prices":
        """From calibrate.json. Raises ValueError for another file."""
        try:
            told = json.loads(path.read_text())
            kept = [{key: one[key] for key in Point.__dataclass_fields__} for one in told["points"]]
            points = tuple(Point(**{**one, "sizes": tuple(one["sizes"])}) for one in kept)
            return cls(points, int(told["machine"]["cores"]))
        except OSError as error:
            raise ValueError(f"--points={path} cannot be read: {error.strerror}") from error
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"--points={path} is not what `megacore bench calibrate --output` writes") from error

    def product(self, flops: float) -> float:
        """Of one product of matrices on one core."""
        return flops / self._speed("gemm", flops, lambda point: point.flops)

    def attention(self, flops: float, backward: bool) -> float:
        """Of ``flops`` in a fused forward, or of its backward's."""
        what = "attention_with_backward" if backward else "attention"
        return flops / self._speed(what, flops, lambda point: point.flops)

    def moved(self, num_bytes: float) -> float:
        """Of an operation that reads and writes so much."""
        return num_bytes / self._speed("add", num_bytes, lambda point: point.num_bytes)

    @property
    def call(self) -> float:
        """Of calling anything at all."""
        return self._alone("call")[0].seconds

    def collective(self, operation: str, ranks: int, num_bytes: float) -> float:
        """Of one collective, by the points of as many ranks or the next measured number."""
        what = operation if operation in COLLECTIVES else "all_reduce"
        own = [point for point in self.points if point.what == what and point.ranks > 1]
        near = min({point.ranks for point in own}, key=lambda number: abs(math.log(number / ranks)))
        return interpolated(sorted((point.num_bytes, point.seconds) for point in own if point.ranks == near), num_bytes)

    def _alone(self, what: str) -> list[Point]:
        return [point for point in self.points if point.what == what and point.threads == 1 and point.dtype == "fp32"]

    def _speed(self, what: str, size: float, of: Callable[[Point], float]) -> float:
        return size / interpolated(sorted((of(point), point.seconds) for point in self._alone(what)), size)


def interpolated(curve: Sequence[tuple[float, float]], size: float) -> float:
    """Seconds at ``size`` from sorted (size, seconds): straight between neighbours in logarithms; below the first as
    long as that one, beyond the last in proportion. Of equal sizes the mean counts."""
    sizes = sorted({each for each, _ in curve})
    means = {each: _mean([seconds for at, seconds in curve if at == each]) for each in sizes}
    if size <= sizes[0]:
        return means[sizes[0]]
    if size >= sizes[-1]:
        return means[sizes[-1]] * size / sizes[-1]
    above = next(place for place, each in enumerate(sizes) if each > size)
    low, high = sizes[above - 1], sizes[above]
    share = math.log(size / low) / math.log(high / low)
    return math.exp(math.log(means[low]) + share * (math.log(means[high]) - math.log(means[low])))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class Priced(TorchDispatchMode):
    """Within: ``seconds`` that the operations would take on one core."""

    def __init__(self, prices: Prices) -> None:
        super().__init__()
        self.prices, self.seconds = prices, 0.0
        self.known: dict[tuple[str, float], float] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
        kind, size = "call", 0.0
        if name in PRODUCTS:
            kind, size = "product", _flops_of_product(name, tensors)
        elif name.startswith(ATTENTION):
            backward = name.endswith("backward")
            b, n, s, d = tensors[1 if backward else 0].shape
            kind = "backward" if backward else "attention"
            size = (BACKWARD_FLOPS if backward else 1.0) * 2 * b * n * s * s * d
        elif not function.is_view and not name.startswith(("empty", "new_empty", "detach")):
            results = [each for each in tree_iter(result) if isinstance(each, Tensor)]
            kind, size = "moved", float(sum(each.nbytes for each in (*tensors, *results)))
        if (kind, size) not in self.known:
            self.known[kind, size] = self.prices.call + self._price(kind, size)
        self.seconds += self.known[kind, size]
        return result

    def _price(self, kind: str, size: float) -> float:
        if not size:
            return 0.0
        if kind == "product":
            return self.prices.product(size)
        if kind == "moved":
            return self.prices.moved(size)
        return self.prices.attention(size, kind == "backward")


def _flops_of_product(name: str, tensors: Sequence[Tensor]) -> float:
    first, second = tensors[1:3] if name in ADDED else tensors[:2]
    inner = first.shape[-1]  # [.., m, k] and [.., k, n], or [n, k] of a layer
    return 2.0 * first.numel() * second.numel() / max(1, inner * (first.shape[0] if first.dim() == 3 else 1))


@dataclass(frozen=True)
class Work:
    """One pipeline rank's step: seconds of computing on one core, and its collectives."""

    computing: float
    collectives: tuple[tuple[CommRecord, int, float], ...]
    """(what, ranks, how often)."""

    def waiting(self, prices: Prices, of_data: bool) -> float:
        """Seconds in collectives over data-parallel axes, or over the others."""
        return sum(
            count * prices.collective(record.operation, ranks, record.num_elements * record.dtype.itemsize)
            for record, ranks, count in self.collectives
            if (record.axis in OF_DATA) == of_data and record.operation != "send"
        )

    def of_core(self, prices: Prices) -> float:
        """What this rank keeps of a core within the schedule: computing, and its share of collectives and messages."""
        return self.computing + sum(
            count
            * prices.collective(record.operation, ranks, record.num_elements * record.dtype.itemsize)
            * min(1.0, prices.cores / ranks)
            for record, ranks, count in self.collectives
            if record.axis not in OF_DATA
        )


def within_a_step(prices: Prices) -> float:
    """How much longer operations take within a step than alone, by the reference run on one core."""
    measured = next(point.seconds for point in prices.points if point.what == "step" and point.threads == 1)
    priced = Imagination(reference_run(), 1, "cpu").rank(0, walk=True, beside=Priced(prices)).beside
    return measured / priced


def predict(config: RunConfig, world: int, prices: Prices, longer: float) -> float:
    """Seconds of a step of a resolved run on this machine's CPUs, with a thread for each rank; ``longer`` is what
    `within_a_step` gives."""
    imagination = Imagination(config, world, "cpu")
    layout, pipeline = imagination.layout, Pipeline.of(config)
    works = []
    for pp in range(layout.pp):
        imagined = imagination.rank(layout.rank({"pp": pp}), walk=True, beside=Priced(prices))
        records = tuple((record, imagined.sizes[record.axis], count) for record, count in imagined.records)
        works.append(Work(longer * imagined.beside, records))
    return combined(config, works, world // layout.pp, pipeline, prices)


def combined(config: RunConfig, works: Sequence[Work], alike: int, pipeline: Pipeline, prices: Prices) -> float:
    """The step's time from the work of each pipeline rank, of each of which ``alike`` ranks have as much."""
    busy = [work.computing + work.waiting(prices, of_data=False) for work in works]
    flops = flops_of_stages(config.model, config.train.seq_len, pipeline.stages)
    home, number = pipeline.schedule.home, pipeline.schedule.num_microbatches
    own = [sum(flops[stage] for stage, its in enumerate(home) if its == rank) for rank in range(len(works))]
    forward = [busy[its] / number * flops[stage] / own[its] / 3 for stage, its in enumerate(home)]
    halves = Durations(forward, [2 * each for each in forward], forward, forward)
    alone = simulate(pipeline.schedule, halves).makespan
    shared = alike * sum(work.of_core(prices) for work in works) / prices.cores
    return max(alone, shared) + max(work.waiting(prices, of_data=True) for work in works)
