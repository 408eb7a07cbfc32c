"""The fastest layouts that fit, found without pricing all of them.

A search walks one queue, ordered by time per sample. A mesh stands in it with the least time that any of its ways could
take: what its devices compute at least, without a bubble and with nothing computed twice. When it comes to the front
its shardings take its place, each with its time without the bubble, and when one of these comes to the front its
schedules do, each with its own time. When such a way comes to the front its memory is asked for, and where that is too
much the same way with more recomputation goes back into the queue. So what comes to the front and fits is the
fastest of all that is left, and the search can stop there. Times in the queue are closed forms; the first few are
priced again with the schedule's list. ``tests/cost/test_search.py`` holds it against pricing everything.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from math import inf
from types import MappingProxyType
from typing import Any

from megacore.config.pipeline import V_SHAPED
from megacore.cost.estimate import HEADROOM, Estimate, assemble, limit_of
from megacore.cost.machine import Machine
from megacore.cost.memory import RankMemory, memory_by_rank
from megacore.cost.practice import OURS, Practice
from megacore.cost.space import Mesh, Space, Way
from megacore.cost.step import StepTime, formula_times, step_time
from megacore.layout.layout import Layout

LONGEST_LIST = 60_000
"""Computations of a schedule that are still simulated; above, the closed form stands."""
AGAIN = 2
"""Layouts beyond those wanted that are priced again with the schedule's list: one of them may pass the others."""
SURELY = 1.05
"""A mesh is dropped where even its smallest way needs so much more than there is."""

Key = Callable[[Mesh, Way], Hashable]


@dataclass(frozen=True)
class Found:
    """``best``: fastest first, one for each key. ``counts``: how many meshes were "meshes" (legal), "too large", how
    many ways were "priced" and "weighed". ``closest``: of what does not fit, the one that needs least."""

    best: tuple[Estimate, ...]
    counts: Mapping[str, int]
    closest: Estimate | None = None


def by_mesh(mesh: Mesh, way: Way) -> Hashable:
    """What makes two layouts different enough to be listed both."""
    return mesh.tp, mesh.pp, mesh.cp, mesh.ep, mesh.etp, way.zero == 3


def by_model_axes(mesh: Mesh, way: Way) -> Hashable:
    """The cell of a heat map."""
    return mesh.tp, mesh.pp


def by_everything(mesh: Mesh, way: Way) -> Hashable:
    """No two layouts are alike."""
    return mesh, way


@dataclass
class Search:
    """One search through ``space``: ``run`` it once."""

    space: Space
    machine: Machine
    practice: Practice = OURS
    headroom: float = HEADROOM
    counts: Counter[str] = field(default_factory=Counter)
    beyond: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """Values of axes with none of which a mesh is looked at, if there are any: it must leave one of them."""
    within: Estimate | None = None
    """What a layout must be faster than."""

    def run(self, top: int, key: Key = by_mesh, simulate: bool = True, again: int = AGAIN) -> Found:
        """The ``top`` fastest, no two of one key; ``again``: how many more are simulated to find them."""
        found, closest = self._walk(top + again if simulate else top, key)
        best = [self._whole(mesh, way, simulate) for mesh, way in found]
        best.sort(key=lambda each: -each.tokens_per_s_per_gpu)
        return Found(tuple(best[:top]), dict(self.counts), self._whole(*closest, False) if closest else None)

    @property
    def slowest(self) -> float:
        """Seconds of a sample from which on nothing is looked at."""
        if self.within is None:
            return inf
        return self.within.step.seconds / self.within.config.train.global_batch_size

    def _walk(self, top: int, key: Key) -> tuple[list[tuple[Mesh, Way]], tuple[Mesh, Way] | None]:
        queue = _Queue()
        for mesh, bound in self._bounds():
            queue.put(bound, mesh, None, False)
        found: dict[Hashable, tuple[Mesh, Way]] = {}
        closest: tuple[int, Mesh, Way] | None = None
        limit = limit_of(self.machine, self.headroom)
        while queue.entries and len(found) < top and queue.entries[0][0] < self.slowest:
            mesh, way, priced = queue.take()
            if way is None:
                least, smallest = self._least(mesh, limit)
                if least > limit and (closest is None or least < closest[0]):
                    closest = least, mesh, smallest
                if least > SURELY * limit:
                    self.counts["too large"] += 1
                    continue
                for first in self.space.firsts(mesh):
                    if key(mesh, first) not in found:
                        queue.put(without_bubble(self._price(mesh, first)) / mesh.batch, mesh, first, False)
            elif key(mesh, way) in found or self.space.problems(self.space.run(mesh, way)):
                continue
            elif not priced:
                for each, step in self._prices(mesh, list(self.space.siblings(mesh, way))):
                    queue.put(step.seconds / mesh.batch, mesh, each, True)
            elif self._most(mesh, way) <= limit:
                found[key(mesh, way)] = mesh, way
            elif smaller := self.space.smaller(way):
                queue.put(self._price(mesh, smaller).seconds / mesh.batch, mesh, smaller, True)
        return list(found.values()), closest[1:] if closest else None

    def _bounds(self) -> list[tuple[Mesh, float]]:
        """Every legal mesh with the least seconds that a sample can take."""
        bounds = []
        for mesh in self.space.meshes():
            if self.beyond and all(getattr(mesh, name) in values for name, values in self.beyond.items()):
                continue
            first = next(self.space.firsts(mesh), None)
            if first is None or self.space.problems(self.space.run(mesh, first)):
                continue
            self.counts["meshes"] += 1
            bounds.append((mesh, least_seconds(self._step(mesh, first, False)) / mesh.batch))
        return bounds

    def _price(self, mesh: Mesh, way: Way) -> StepTime:
        """By the closed form."""
        self.counts["priced"] += 1
        return self._step(mesh, way, False)

    def _prices(self, mesh: Mesh, ways: list[Way]) -> Iterator[tuple[Way, StepTime]]:
        """The same of ways that differ only in their schedule; those that cut the layers alike share the work."""
        alike: dict[tuple[int, bool], list[Way]] = {}
        for way in ways:
            alike.setdefault((way.chunks, way.schedule in V_SHAPED), []).append(way)
        for group in alike.values():
            self.counts["priced"] += len(group)
            config = self.space.run(mesh, group[0])
            layout = Layout.of(config.parallel, self.space.world)
            kinds = [way.schedule for way in group]
            yield from zip(group, formula_times(config, layout, self.machine, self.practice, kinds), strict=True)

    def _most(self, mesh: Mesh, way: Way) -> int:
        """Bytes of the rank that needs most."""
        self.counts["weighed"] += 1
        return max(rank.total for rank in self._memory(mesh, way))

    def _least(self, mesh: Mesh, enough: int) -> tuple[int, Way]:
        """Bytes of the first of the smallest ways that needs at most ``enough``, else of that which needs least."""
        least: tuple[int, Way] | None = None
        for way in self.space.smallest(mesh):
            most = self._most(mesh, way)
            if least is None or most < least[0]:
                least = most, way
            if most <= enough:
                break
        assert least is not None, mesh
        return least

    def _memory(self, mesh: Mesh, way: Way) -> tuple[RankMemory, ...]:
        config = self.space.run(mesh, way)
        return memory_by_rank(config, Layout.of(config.parallel, self.space.world), self.practice)

    def _step(self, mesh: Mesh, way: Way, simulate: bool) -> StepTime:
        config = self.space.run(mesh, way)
        return step_time(config, Layout.of(config.parallel, self.space.world), self.machine, self.practice, simulate)

    def _whole(self, mesh: Mesh, way: Way, simulate: bool) -> Estimate:
        config = self.space.run(mesh, way)
        layout = Layout.of(config.parallel, self.space.world)
        computations = layout.num_stages * mesh.batch // (mesh.micro * mesh.dp)
        step = self._step(mesh, way, simulate and computations <= LONGEST_LIST)
        return assemble(config, layout, self.machine, step, self._memory(mesh, way), self.headroom)


class _Queue:
    """Meshes (without a way), shardings and priced ways; the one that may be fastest comes first."""

    def __init__(self) -> None:
        self.entries: list[tuple[float, int, Mesh, Way | None, bool]] = []
        self._number = count()

    def put(self, bound: float, mesh: Mesh, way: Way | None, priced: bool) -> None:
        heappush(self.entries, (bound, next(self._number), mesh, way, priced))

    def take(self) -> tuple[Mesh, Way | None, bool]:
        return heappop(self.entries)[2:]


def least_seconds(step: StepTime) -> float:
    """What every way of a mesh takes at least: what its ranks compute and wait for inside layers, in the mean."""
    parts = step.breakdown
    return without_bubble(step) - sum(parts.get(name, 0.0) for name in ("dp", "optimizer"))


def without_bubble(step: StepTime) -> float:
    """What a sharding takes at least, whatever the schedule: nothing idle, and stragglers less in proportion."""
    parts = step.breakdown
    idle = parts.get("bubble", 0.0) + parts.get("pp", 0.0)
    after = sum(parts.get(name, 0.0) for name in ("dp", "optimizer", "host", "stragglers"))
    share = min(1.0, idle / max(idle, step.seconds - after, 1e-12))
    return step.seconds - idle - share * parts.get("stragglers", 0.0)
