"""One layout, priced: how long a step takes, what every rank must hold, and what that means for a user."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from megacore.config.schema import RunConfig
from megacore.config.supported import unsupported
from megacore.cost.machine import Machine
from megacore.cost.memory import RankMemory, memory_by_rank
from megacore.cost.practice import OURS, Practice
from megacore.cost.states import spec_of
from megacore.cost.step import StepTime, step_time
from megacore.layout.layout import Layout
from megacore.spec.flops import train_flops_per_token

HEADROOM = 0.1
"""Share of a device's memory that a plan leaves free: what varies from step to step, and what no model knows."""
GB = 1e9
AXES = ("tp", "pp", "dp", "cp", "ep")
OF_LAYOUT = (
    *("tp", "pp", "cp", "ep", "etp", "dp", "dp_shard", "chunks", "stage_layers", "schedule", "zero"),
    *("sequence_parallel", "recompute"),
)
"""Keys of [parallel] that make a layout."""


@dataclass(frozen=True)
class Estimate:
    """``config`` is resolved; ``memory`` has an entry for each pipeline rank; ``limit`` is how many bytes of a device
    may be used; ``notes`` are what a user should know of this estimate."""

    config: RunConfig
    layout: Layout
    step: StepTime
    memory: tuple[RankMemory, ...]
    limit: int
    tflops_per_gpu: float
    mfu: float | None
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.config.train.global_batch_size * self.config.train.seq_len

    @property
    def tokens_per_s(self) -> float:
        """Of all devices together."""
        return self.tokens / self.step.seconds

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """What layouts are ranked by."""
        return self.tokens_per_s / self.layout.world

    @property
    def worst(self) -> RankMemory:
        """The pipeline rank that needs most."""
        return max(self.memory, key=lambda rank: rank.total)

    @property
    def fits(self) -> bool:
        """Whether every rank stays within the limit."""
        return self.worst.total <= self.limit

    @property
    def microbatches(self) -> int:
        """That a pipeline takes in a step."""
        t = self.config.train
        return max(1, t.global_batch_size // (t.micro_batch_size * self.layout.dp))

    def name(self) -> str:
        """The layout in a few words, such as ``tp8 x pp4 x dp4, zero 1, zb-h1, micro 2``."""
        p, words = self.config.parallel, [self.layout.describe()]
        words += [f"zero {p.zero}" + f" over {p.dp_shard} ranks" * (p.dp_shard < p.dp)] * (p.zero > 0)
        if p.pp > 1:
            words.append(p.schedule + f" x{p.chunks}" * (p.schedule == "interleaved"))
        words += [f"recompute {p.recompute}"] * (p.recompute != "none")
        return ", ".join([*words, f"micro {self.config.train.micro_batch_size}"])

    def layout_dict(self) -> dict[str, Any]:
        """The layout's keys, as a run file has them, with the batch."""
        p, t = self.config.parallel, self.config.train
        keys = {name: getattr(p, name) for name in OF_LAYOUT}
        keys["stage_layers"] = list(p.stage_layers)
        return keys | {
            "world": self.layout.world,
            "micro_batch_size": t.micro_batch_size,
            "global_batch_size": t.global_batch_size,
            "microbatches": self.microbatches,
            "seq_len": t.seq_len,
        }

    def as_json(self) -> dict[str, Any]:
        """What ``plan --json`` gives of an estimate; seconds, bytes / 1e9, shares."""
        worst = self.worst
        return {
            "layout": self.layout_dict(),
            "step_time_s": self.step.seconds,
            "tflops_per_gpu": self.tflops_per_gpu,
            "mfu": self.mfu,
            "tokens_per_s_per_gpu": self.tokens_per_s_per_gpu,
            "bubble_fraction": self.step.bubble_fraction,
            "memory_gb": memory_json(worst),
            "communication_s": {axis: self.step.communication.get(axis, 0.0) for axis in AXES},
            "fits": self.fits,
            "notes": list(self.notes),
            "memory_limit_gb": self.limit / GB,
            "memory_by_rank_gb": [memory_json(rank) for rank in self.memory],
            "time_s": terms(self.step),
        }


def memory_json(rank: RankMemory) -> dict[str, float]:
    """Components and their total, in bytes / 1e9."""
    return {field.name: getattr(rank, field.name) / GB for field in fields(rank)} | {"total": rank.total / GB}


def estimate(
    config: RunConfig,
    world: int,
    machine: Machine,
    practice: Practice = OURS,
    simulate: bool = True,
    headroom: float = HEADROOM,
) -> Estimate:
    """Price a resolved, legal run on ``world`` devices. ``simulate``: the schedule's list instead of its formula."""
    layout = Layout.of(config.parallel, world)
    step = step_time(config, layout, machine, practice, simulate)
    return assemble(config, layout, machine, step, memory_by_rank(config, layout, practice), headroom)


def assemble(
    config: RunConfig,
    layout: Layout,
    machine: Machine,
    step: StepTime,
    memory: tuple[RankMemory, ...],
    headroom: float = HEADROOM,
) -> Estimate:
    """An estimate of what is priced already."""
    tokens = config.train.global_batch_size * config.train.seq_len
    flops = tokens * train_flops_per_token(spec_of(config.model), config.train.seq_len)
    tflops = flops / step.seconds / layout.world / 1e12
    dtype = "fp8" if config.precision.fp8 != "off" else config.precision.dtype
    peak = machine.accelerator.peak_tflops(dtype)
    limit = limit_of(machine, headroom)
    found = Estimate(config, layout, step, memory, limit, tflops, tflops / peak if peak else None)
    return with_notes(found, notes_of(found, headroom))


def limit_of(machine: Machine, headroom: float = HEADROOM) -> int:
    """Bytes of a device that a plan may use."""
    return int(machine.accelerator.memory_gb * GB * (1 - headroom))


def with_notes(found: Estimate, more: tuple[str, ...]) -> Estimate:
    """The same with more to say."""
    return replace(found, notes=(*found.notes, *more))


def notes_of(found: Estimate, headroom: float) -> tuple[str, ...]:
    """What a reader of the figures should know."""
    notes = [f"the engine does not run this yet: {line}" for line in unsupported(found.config)]
    if not found.fits:
        rank = found.memory.index(found.worst)
        notes.append(
            f"does not fit: pipeline rank {rank} needs {found.worst.total / GB:.1f} GB of {found.limit / GB:.1f} GB "
            f"({headroom:.0%} of the memory are left free)"
        )
    elif found.worst.total > 0.95 * found.limit:
        notes.append(f"memory is tight: {found.worst.total / GB:.1f} GB of {found.limit / GB:.1f} GB")
    p = found.layout
    if p.pp > 1 and found.microbatches < p.pp:
        notes.append(
            f"{found.microbatches} microbatches do not fill {p.pp} pipeline ranks: the bubble is "
            f"{found.step.bubble_fraction:.0%} of the step; a larger train.global_batch_size shrinks it"
        )
    return tuple(notes)


def terms(step: StepTime) -> Mapping[str, float]:
    """The parts of a step that add up to its seconds, in seconds."""
    return dict(step.breakdown)
