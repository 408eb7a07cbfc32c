"""How long a training step takes: every stage's work, through the schedule, with what travels and what follows it.

    step = (pipeline + sums and gathers over dp that nothing hides + optimizer) x stragglers + host

A stage's work is that of its blocks (``cost/blocks.py``); the pipeline's time is that of the schedule's own list,
simulated, or of its closed form (``cost/pipelines.py``), which takes a fraction of a millisecond.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np

from megacore.config.pipeline import V_SHAPED
from megacore.config.schema import ModelConfig, OptimConfig, PrecisionConfig, RunConfig
from megacore.cost.blocks import Parts, Share, Work, block_work, ends_work
from megacore.cost.collectives import collective_s
from megacore.cost.cutting import StageKind, cutting_of
from megacore.cost.machine import Machine
from megacore.cost.pipelines import StageTimes, pipeline_s
from megacore.cost.practice import OURS, Practice
from megacore.cost.roofline import Device
from megacore.cost.simulate import Durations, simulate
from megacore.cost.states import Cut, sizes_of
from megacore.cost.timeline import Timeline
from megacore.layout.layout import Layout
from megacore.schedule.generators.generate import generate
from megacore.schedule.schedule import Schedule
from megacore.schedule.text import from_text
from megacore.spec.memory import ITEM_BYTES

STATE_BYTES = 30.0
"""What AdamW with fp32 master weights moves of an element, and its norm's part."""
HOST_GB_PER_S = 20.0
"""Between a device and its host: what offloaded state travels at."""
STRAGGLING = 0.005
"""How much longer a step takes for every doubling of nodes: the slowest of more ranks sets the pace."""
CONTENTION = 0.1
"""Of collectives that go beside computing, what they take away from it."""
FIRST = 3
"""Forward, input gradient, weight gradient."""

Works = tuple[tuple[Parts, Parts, Parts], ...]
"""Of each kind of stage: a microbatch's forward, input gradient and weight gradient."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. ``communication`` is what is waited for by axis, ``hidden`` what goes beside computing;
    ``breakdown`` are the parts that add up to ``seconds``, those of the pipeline as the mean of its ranks."""

    seconds: float
    bubble_fraction: float
    compute: float
    optimizer: float
    communication: Mapping[str, float]
    hidden: Mapping[str, float]
    breakdown: Mapping[str, float]
    timeline: Timeline | None = field(default=None, repr=False, compare=False)


def step_time(
    config: RunConfig, layout: Layout, machine: Machine, practice: Practice = OURS, simulate: bool = True
) -> StepTime:
    """Price a step of a resolved run; ``simulate``: the schedule's list not its formula.

    Raises ValueError where the layers cannot be cut into the layout's stages.
    """
    return _Step(config, layout, machine, practice).time(simulate)


def formula_times(
    config: RunConfig, layout: Layout, machine: Machine, practice: Practice, kinds: Iterable[str]
) -> list[StepTime]:
    """By the closed form, of each of the schedules ``kinds``; all must cut the layers as the run's own does."""
    step = _Step(config, layout, machine, practice)
    return [step.formula(kind) for kind in kinds]


class _Step:
    """What the parts of one layout's step take."""

    def __init__(self, config: RunConfig, layout: Layout, machine: Machine, practice: Practice) -> None:
        self.config, self.layout, self.machine, self.practice = config, layout, machine, practice
        p, t = config.parallel, config.train
        self.item = ITEM_BYTES[config.precision.dtype]
        self.microbatches = max(1, t.global_batch_size // (t.micro_batch_size * layout.dp))
        device = Device(machine, config.precision.dtype, config.precision.fp8 != "off", self.item)
        self.share = Share(
            device=device,
            practice=practice,
            seq_len=t.seq_len,
            tokens=t.micro_batch_size * t.seq_len // layout.cp,
            tp=layout.tp,
            cp=layout.cp,
            ep=layout.ep,
            etp=layout.etp,
            sequence=p.sequence_parallel,
            regather=p.regather_inputs,
            recompute=p.recompute,
        )
        folded = p.schedule in V_SHAPED
        self.cutting = cutting_of(
            config.model, config.optim, config.precision, t.seq_len, layout.pp, layout.chunks, folded, p.stage_layers
        )
        self.shards = layout.dp_shard * (layout.cp if practice.shards_over_cp else 1)
        cut = Cut(layout.tp, layout.ep, layout.etp, layout.zero, self.shards, max(1, layout.edp // layout.dp_replicate))
        of_units = (config.model, config.optim, config.precision, practice, cut)
        self.numel = np.array(_numels(self.cutting.stage_kinds, *of_units))
        """Of each kind of stage, elements that are on a rank, or would be if nothing were sharded."""

    def time(self, simulated: bool) -> StepTime:
        """All together."""
        if not simulated:
            return self.formula(self.config.parallel.schedule)
        timeline = simulate(self.schedule(), self.durations(self.times, self.p2p))
        return self.assemble(timeline.makespan, timeline)

    def formula(self, kind: str) -> StepTime:
        """With the closed form of a schedule that cuts the layers as the run's own does."""
        return self.assemble(pipeline_s(kind, self.times, self.microbatches, self.p2p), None)

    @cached_property
    def works(self) -> Works:
        """Of each kind of stage."""
        return _works(self.config.model, self.cutting.stage_kinds, self.share)

    @cached_property
    def waits(self) -> list[tuple[float, float]]:
        """See ``unit_waits``."""
        return self.unit_waits(self.works)

    @cached_property
    def times(self) -> StageTimes:
        """See ``stage_times``."""
        return self.stage_times(self.works, self.waits)

    @cached_property
    def p2p(self) -> float:
        """See ``message``."""
        return self.message()

    @cached_property
    def total(self) -> Parts:
        """What all stages do for a microbatch."""
        counts = self.cutting.total.tolist()
        return _total([(half, n) for work, n in zip(self.works, counts, strict=True) for half in work])

    @cached_property
    def after(self) -> tuple[float, float]:
        """See ``data_parallel``."""
        return self.data_parallel(self.times)

    @cached_property
    def update(self) -> float:
        """See ``optimizer``."""
        return self.optimizer()

    @cached_property
    def busy(self) -> float:
        """Seconds that ranks work in the pipeline, in the mean."""
        return self.microbatches * float(self.times.rows.sum()) / self.layout.pp

    def stage_times(self, works: Works, waits: list[tuple[float, float]]) -> StageTimes:
        """Seconds of each stage, slowed by what goes beside."""
        pace = self.practice.pace
        rows = []
        for (forward, back, weight), (wait_forward, wait_back) in zip(works, waits, strict=True):
            rows.append(
                (
                    (forward.seconds + CONTENTION * _hidden(forward)) / pace + wait_forward,
                    (back.seconds + CONTENTION * _hidden(back)) / pace + wait_back,
                    weight.seconds / pace,
                )
            )
        of_kinds = np.array(rows)
        return StageTimes(of_kinds[self.cutting.kind_of], self.cutting.home, self.layout.pp, of_kinds)

    def durations(self, times: StageTimes, p2p: float) -> Durations:
        """For the simulator."""
        forward, back, weight = times.rows.T

        return Durations(forward.tolist(), (back + weight).tolist(), back.tolist(), weight.tolist(), p2p=p2p)

    def schedule(self) -> Schedule:
        """The run's list."""
        p = self.config.parallel
        if p.schedule.endswith(".txt"):
            return from_text(Path(p.schedule).read_text(encoding="utf-8"), p.schedule)
        return _generated(p.schedule, self.layout.pp, self.microbatches, self.layout.chunks)

    def message(self) -> float:
        """Seconds of a message between stages."""
        if self.layout.pp == 1:
            return 0.0
        size = self.share.outside * self.config.model.hidden_size * self.item
        if self.practice.p2p_split and not self.share.sequence:
            size /= self.layout.tp
        stride = self.layout.tp * self.layout.cp * self.layout.dp
        return collective_s(self.machine, "send", size, 2, stride)

    def unit_waits(self, works: Works) -> list[tuple[float, float]]:
        """Of each stage's microbatch, what forward and backward wait for parameters (ZeRO-3) and sums (ZeRO-2, 3)."""
        zero, layout = self.layout.zero, self.layout
        if zero < 2 or layout.dp * layout.cp == 1:
            return [(0.0, 0.0)] * len(works)
        kept = self.practice.whole_units and layout.pp > 1
        if kept:
            return [(0.0, 0.0)] * len(works)
        found = []
        for numel, (forward, back, weight) in zip(self.numel.tolist(), works, strict=True):
            gather = self.over_data("all_gather", numel * self.item, numel) if zero == 3 else 0.0
            summed = self.over_data("reduce_scatter", numel * self.reduce_bytes, numel)
            found.append(
                (self.exposed(gather, forward.seconds), self.exposed(gather + summed, back.seconds + weight.seconds))
            )
        return found

    def exposed(self, collectives: float, beside: float) -> float:
        """What is waited for, where ``beside`` seconds of computing may hide the collectives."""
        hidden = min(collectives * self.practice.overlap_dp, beside)
        return collectives - hidden + CONTENTION * hidden

    @property
    def reduce_bytes(self) -> float:
        """Of a gradient that travels."""
        return self.practice.reduce_bytes or float(ITEM_BYTES[self.config.precision.grad_reduce_dtype])

    def over_data(self, kind: str, num_bytes: float, numel: float) -> float:
        """Seconds of a collective over the ranks that shard, and of that over replicas."""
        layout = self.layout
        shards = layout.dp_shard * layout.cp
        seconds = collective_s(self.machine, kind, num_bytes, shards, layout.tp)
        if layout.dp_replicate > 1 and kind == "reduce_scatter":
            stride = layout.tp * shards
            seconds += collective_s(self.machine, "all_reduce", num_bytes / shards, layout.dp_replicate, stride)
        return seconds

    def data_parallel(self, times: StageTimes) -> tuple[float, float]:
        """(waited for, hidden) after or beside the pipeline: sums of gradients, gathers of updated parameters."""
        layout, zero = self.layout, self.layout.zero
        if layout.dp * layout.cp == 1:
            return 0.0, 0.0
        kept = self.practice.whole_units and layout.pp > 1
        worst = hidden = 0.0
        rows = times.of_kinds
        for counts in self.cutting.ranks:
            numel = float(counts @ self.numel)
            forward, back = counts @ rows[:, 0], counts @ rows[:, 1:].sum(axis=1)
            sums = gathers = 0.0
            if zero == 0:
                size = numel * self.reduce_bytes
                sums = collective_s(self.machine, "all_reduce", size, layout.dp * layout.cp, layout.tp)
            elif zero == 1 or kept:
                sums = self.over_data("reduce_scatter", numel * self.reduce_bytes, numel)
            if zero in (1, 2) or (zero == 3 and kept):
                gathers = self.over_data("all_gather", numel * self.item, numel)
            waited = self.exposed(sums, float(back)) + self.exposed(gathers, float(forward))
            if waited >= worst:
                worst, hidden = waited, max(0.0, sums + gathers - waited)
        return worst, hidden

    def optimizer(self) -> float:
        """The slowest rank's update."""
        sharing = self.shards if self.layout.zero else 1
        numel = float((self.cutting.ranks @ self.numel).max()) / sharing
        if self.config.optim.offload != "none":
            return numel * (ITEM_BYTES["fp32"] + self.item) / HOST_GB_PER_S / 1e9
        return numel * STATE_BYTES / self.share.device.memory

    def assemble(self, pipeline: float, timeline: Timeline | None) -> StepTime:
        """The parts of a step, of ranks in the mean."""
        layout, m, pp = self.layout, self.microbatches, self.layout.pp
        per = m / pp / self.practice.pace
        counts, total = self.cutting.total.tolist(), self.total
        units = m / pp * sum(n * (forward + back) for n, (forward, back) in zip(counts, self.waits, strict=True))
        after, hidden_dp = self.after
        optimizer = self.update
        idle = max(0.0, pipeline - self.busy)
        sends = 0.0 if pp == 1 else min(idle, 2 * self.p2p * (layout.chunks if layout.chunks > 1 else 1) * 2)
        straggling = STRAGGLING * np.log2(max(1.0, layout.world / self.machine.gpus_per_node)).item() * pipeline
        contention = CONTENTION * _hidden(total) * per
        breakdown = {
            "matrix products": total.products * per,
            "attention": total.attention * per,
            "memory-bound work": total.memory * per,
            "launching kernels": total.host * per,
            "recomputation": total.recompute * per,
            "tp": total.tp * per,
            "cp": total.cp * per,
            "ep": total.ep * per,
            "dp": after + units,
            "pp": sends,
            "bubble": idle - sends,
            "contention": contention,
            "optimizer": optimizer,
            "stragglers": straggling,
            "host": self.practice.step_s,
        }
        seconds = sum(breakdown.values())
        compute = sum(breakdown[name] for name in _COMPUTE)
        axes = {axis: breakdown[axis] for axis in ("tp", "pp", "dp", "cp", "ep")}
        hidden = {
            "tp": total.hidden_tp * per,
            "cp": total.hidden_cp * per,
            "ep": total.hidden_ep * per,
            "dp": hidden_dp,
        }
        return StepTime(
            seconds=seconds,
            bubble_fraction=breakdown["bubble"] / seconds,
            compute=compute,
            optimizer=optimizer,
            communication=MappingProxyType(axes),
            hidden=MappingProxyType(hidden | {"pp": 0.0}),
            breakdown=MappingProxyType(breakdown),
            timeline=timeline,
        )


_COMPUTE = ("matrix products", "attention", "memory-bound work", "launching kernels", "recomputation")


def _hidden(parts: Parts) -> float:
    return parts.hidden_tp + parts.hidden_cp + parts.hidden_ep


def _total(some: list[tuple[Parts, int]]) -> Parts:
    columns = zip(*([value * n for value in parts] for parts, n in some), strict=True)
    return Parts(*(sum(column) for column in columns)) if some else Parts()


@lru_cache(maxsize=64)
def _generated(kind: str, ranks: int, microbatches: int, chunks: int) -> Schedule:
    return generate(kind, ranks, microbatches, chunks)


@lru_cache(maxsize=1 << 14)
def _works(model: ModelConfig, kinds: tuple[StageKind, ...], share: Share) -> Works:
    embedding, head = ends_work(model, share)
    found = []
    for kind in kinds:
        units: list[tuple[Work, int]] = [(block_work(model, layer, share), n) for layer, n in kind.blocks]
        units += [(embedding, 1)] * kind.first + [(head, 1)] * kind.last
        forward, back, weight = (_total([(unit[half], n) for unit, n in units]) for half in range(FIRST))
        found.append((forward, back, weight))
    return tuple(found)


@lru_cache(maxsize=1 << 14)
def _numels(
    kinds: tuple[StageKind, ...],
    model: ModelConfig,
    optim: OptimConfig,
    precision: PrecisionConfig,
    practice: Practice,
    cut: Cut,
) -> tuple[float, ...]:
    found = []
    for kind in kinds:
        units = [("block", layer, n) for layer, n in kind.blocks]
        units += [("embedding", 0, 1)] * kind.first + [("head", 0, 1)] * kind.last
        sizes = (sizes_of((unit, layer), model, optim, precision, practice, cut) for unit, layer, _ in units)
        found.append(sum(float(each.numel) * n for each, (_, _, n) in zip(sizes, units, strict=True)))
    return tuple(found)
