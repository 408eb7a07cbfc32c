"""How two programs are compared fairly on a machine whose speed wanders.

Steps of one and the same program vary two- or threefold on a shared machine, so no absolute time is worth quoting.
All sides therefore take turns within one run, in an order that changes every round, and are compared best with best,
median with median, and round by round.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar


class Case(Protocol):
    """Something to be measured, of a set that can be asked for by name."""

    @property
    def name(self) -> str: ...


AnyCase = TypeVar("AnyCase", bound=Case)


@dataclass(frozen=True)
class Timings:
    """Seconds of each round of one side, in the order of the rounds."""

    name: str
    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile."""
        return quartiles_of(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """How many times faster one side is than another: above 1 the first side wins."""

    best: float  # best time against best time
    median: float  # median against median
    rounds: float  # median over the rounds of the ratio within a round
    rounds_quartiles: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """One benchmark: what was timed and the side that the others are held against (`ours`)."""

    name: str
    ours: str
    sides: tuple[Timings, ...]
    settings: Mapping[str, object]

    def side(self, name: str) -> Timings:
        return next(side for side in self.sides if side.name == name)

    def ratio(self, baseline: str) -> Ratio:
        """How many times faster `ours` is than `baseline`."""
        ours, theirs = self.side(self.ours), self.side(baseline)
        rounds = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
        return Ratio(
            best=theirs.best / ours.best,
            median=theirs.median / ours.median,
            rounds=statistics.median(rounds),
            rounds_quartiles=quartiles_of(rounds),
        )

    def ratios(self) -> dict[str, Ratio]:
        """Baseline -> ratio, for every side but ours."""
        return {side.name: self.ratio(side.name) for side in self.sides if side.name != self.ours}


def case_named(name: str, cases: Sequence[AnyCase]) -> AnyCase:
    """The case of that name. Raises ValueError if there is none."""
    for case in cases:
        if case.name == name:
            return case
    raise ValueError(f"there is no case {name!r}; the cases are {', '.join(case.name for case in cases)}")


def quartiles_of(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile; of a single value, that value twice."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def alternate(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 3,
    before: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time every side once per round, `rounds` times after `warmup` untimed rounds.

    `before` runs untimed ahead of each call: a barrier where several processes work together. The order is rotated
    each round, so that no side always inherits the same neighbour's caches.

    Returns name -> seconds of each round.
    """
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect(0)
            before()
            start = clock()
            sides[name]()
            elapsed = clock() - start
            if number >= warmup:
                seconds[name].append(elapsed)
    return seconds


def slowest_rank(per_rank: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """A step is over when its last rank is: per round, the largest of the ranks' seconds."""
    return {
        name: [max(times) for times in zip(*(rank[name] for rank in per_rank), strict=True)] for name in per_rank[0]
    }


def comparison(
    name: str, ours: str, seconds: Mapping[str, Sequence[float]], settings: Mapping[str, object]
) -> Comparison:
    """Bind timings to the benchmark they belong to."""
    if ours not in seconds:
        raise ValueError(f"benchmark {name}: the side {ours!r} was not timed; timed were {', '.join(seconds)}")
    sides = tuple(Timings(side, tuple(times)) for side, times in seconds.items())
    return Comparison(name, ours, sides, dict(settings))
