"""What `megacore train --dry-run` finds out about ranks by building them: told as lines, and as data.

Not every rank is built: those of one pipeline rank that hold equally many elements are alike, and the first of them (of
the first dp rank, whose shards are never the smaller ones) stands for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megacore.config.schema import RunConfig
from megacore.cost.memory import RankMemory, memory_by_rank
from megacore.layout.layout import Layout
from megacore.monitor.console import human_bytes
from megacore.schedule.live import peak_activations
from megacore.spec import ModelSpec
from megacore.train.pipeline_overview import Pipeline

if TYPE_CHECKING:
    from megacore.train.imagine import Imagined

MOST_WALKED = 4
"""Pipeline ranks that are taken through a step where there are more: the ends, the second and the middle one."""

GB = 1e9
KINDS = ("params", "grads", "optimizer")


@dataclass(frozen=True)
class Stand:
    """A rank that stands for ``number`` ranks which hold as much."""

    rank: int
    number: int
    walk: bool


@dataclass(frozen=True)
class DryRun:
    """Ranks as they were built; ``unbuilt`` is why the optimizer was not, if it was not. A step that nobody walked is
    told as the planner has it."""

    config: RunConfig
    layout: Layout
    device: str
    stands: tuple[Stand, ...]
    ranks: tuple[Imagined, ...]
    pipeline: Pipeline
    memory: tuple[RankMemory, ...]
    """What the planner says of each pipeline rank."""
    unbuilt: str = ""
    unwalked: str = ""
    """Why no rank was taken through a step, if none was."""
    gpu: str = ""
    gpu_bytes: float = 0.0
    """Memory of one ``gpu``, if one was named."""

    def planned(self, rank: Imagined) -> int:
        """What the planner says of a step's activations and buffers."""
        of = self.memory[rank.at["pp"]]
        return of.activations + of.buffers

    def total(self, rank: Imagined) -> int:
        """All of the device's memory that tensors take on a rank."""
        step = self.planned(rank) if rank.step_bytes is None else rank.step_bytes
        return rank.state_bytes + step

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"built    {len(self.ranks)} of {self.layout.world} ranks, with kernels for {self.device}:"]
        lines += _columns(list(self._table()))
        if self.unbuilt:
            lines.append(f"built    the optimizer's bytes are the spec's: {self.unbuilt}")
        if self.unwalked:
            lines.append(f"built    no step was walked: {self.unwalked}")
        wrong = [rank.rank for rank in self.ranks if not rank.agrees]
        lines.append(
            f"warning  buffers and spec differ on rank {', '.join(map(str, wrong))}"
            if wrong
            else "built    parameters, gradients and optimizer state have the bytes that the spec counts"
        )
        return lines + [line for rank in self.ranks for line in self._traffic(rank)]

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data, in bytes."""
        peaks = peak_activations(self.pipeline.schedule)
        axes = ("tp", "pp", "cp", "dp", "dp_shard", "zero", "chunks")
        return {
            "world": self.layout.world,
            "layout": {axis: getattr(self.layout, axis) for axis in axes},
            "device": self.device,
            "schedule": self.pipeline.schedule.kind,
            "microbatches": self.pipeline.schedule.num_microbatches,
            "bubble_fraction": self.pipeline.bubble_fraction,
            "peak_activations": list(peaks),
            "optimizer_not_built": self.unbuilt,
            "step_not_walked": self.unwalked,
            "gpu": self.gpu,
            "ranks": [self._rank_as_json(stand, rank) for stand, rank in zip(self.stands, self.ranks)],
        }

    def _rank_as_json(self, stand: Stand, rank: Imagined) -> dict[str, Any]:
        bytes_of = {kind: held.memory for kind, held in rank.state.items()}
        gaps = sum(held.memory - held.used for held in rank.state.values())
        total = self.total(rank)
        return {
            "rank": rank.rank,
            "stands_for": stand.number,
            **{axis: rank.at[axis] for axis in ("pp", "tp", "dp")},
            **{kind: bytes_of.get(kind, getattr(rank.spec, kind)) for kind in KINDS},
            "gaps": gaps,
            "spec": {kind: getattr(rank.spec, kind) for kind in (*KINDS, "host", "files")},
            "agrees": rank.agrees,
            "step": rank.step_bytes,
            "planned_step": self.planned(rank),
            "total": total,
            "fits": total <= self.gpu_bytes if self.gpu else None,
            "communication": [
                {"axis": axis, "operation": operation, "count": count, "bytes": size}
                for axis, operation, count, size in rank.traffic
            ],
        }

    def _table(self) -> Iterator[list[str]]:
        limit = [f"of {self.gpu_bytes / GB:.0f} GB"] if self.gpu else []
        yield ["rank", "pp", "tp", "like it", *KINDS, "a step's peak", "as planned", "together", *limit]
        for stand, rank in zip(self.stands, self.ranks):
            sizes = [rank.state[kind].memory if kind in rank.state else getattr(rank.spec, kind) for kind in KINDS]
            step = "not walked" if rank.step_bytes is None else human_bytes(rank.step_bytes)
            share = [f"{self.total(rank) / self.gpu_bytes:.0%}"] if self.gpu else []
            at = [str(rank.rank), str(rank.at["pp"]), str(rank.at["tp"]), str(stand.number)]
            all_of_it = human_bytes(self.total(rank))
            yield [*at, *map(human_bytes, sizes), step, human_bytes(self.planned(rank)), all_of_it, *share]

    def _traffic(self, rank: Imagined) -> Iterator[str]:
        words = [
            f"{axis} {operation} {count}x {human_bytes(size)}"
            for axis, operation, count, size in sorted(rank.traffic, key=lambda each: -each[3])
        ]
        if words:
            yield f"step     rank {rank.rank} sends: {', '.join(words)}"


def stands_of(config: RunConfig, layout: Layout, pipeline: Pipeline) -> tuple[Stand, ...]:
    """The ranks to build, of a resolved run."""
    by_rank = pipeline.params(ModelSpec.of(config.model))
    stands = []
    for pp, params in enumerate(by_rank):
        alike: dict[tuple[int, ...], list[int]] = {}
        for tp in range(layout.tp):
            alike.setdefault(tuple(param.local_numel(tp, layout.tp) for param in params), []).append(tp)
        walk = pp in walked_of(layout.pp)
        for number, members in enumerate(alike.values()):
            count = len(members) * layout.dp * layout.cp
            stands.append(Stand(layout.rank({"pp": pp, "tp": members[0]}), count, walk and number == 0))
    return tuple(stands)


def walked_of(num: int) -> Sequence[int]:
    """Of so many pipeline ranks those that are taken through a step."""
    return range(num) if num <= MOST_WALKED else (0, 1, num // 2, num - 1)


def dry_run(config: RunConfig, world: int, device: str, gpu: str = "", gpu_bytes: float = 0.0) -> DryRun:
    """Build the ranks that stand for all, on the meta device; brings torch. ``config`` is checked and resolved;
    ``device`` is cpu or cuda."""
    from megacore.train.imagine import Imagination

    imagination = Imagination(config, world, device)
    pipeline = Pipeline.of(config)
    stands = stands_of(config, imagination.layout, pipeline)
    ranks = tuple(imagination.rank(stand.rank, stand.walk) for stand in stands)
    reasons = imagination.unbuilt, imagination.unwalked
    memory = memory_by_rank(config, imagination.layout)
    return DryRun(config, imagination.layout, device, stands, ranks, pipeline, memory, *reasons, gpu, gpu_bytes)


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[place]) for row in rows if place < len(row)) for place in range(max(map(len, rows)))]
    for row in rows:
        yield ("         " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths))).rstrip()
