"""How much of its time a pipeline idles: the engine on stages of fixed durations, beside what the simulator predicts.

The engine is the real one, with its messages over gloo and its deferred weight gradients; only the stages' computing is
asleep (see `sleeping`). Both bubbles are by makespan: 1 - computing / (ranks x time from first to last computing).
The prediction takes what a message costs here: the gap between stages that one microbatch finds on its way through.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from megacore.bench.harness import case_named, quartiles_of
from megacore.bench.sleeping import Seconds, SleepingStage
from megacore.cost.simulate import Durations, simulate
from megacore.cost.timeline import Timeline
from megacore.layout import Layout
from megacore.mesh import process_group
from megacore.mesh.mesh import ParallelMesh
from megacore.mesh.rank_info import RankInfo
from megacore.model.inputs import Inputs
from megacore.parallel.wgrad import WeightGradients
from megacore.pipeline.engine import Actions, PipelineEngine, nothing
from megacore.schedule.check import check
from megacore.schedule.generators.generate import forward_only, generate
from megacore.schedule.lower import lower
from megacore.schedule.schedule import Schedule
from megacore.train.timing import StepClock

TOKENS, HIDDEN = 256, 256
"""Of a microbatch: messages of 256 KiB."""
PINGS = 5
"""Microbatches whose way through the stages is timed."""


@dataclass(frozen=True)
class Case:
    """One pipeline; ``chunks`` 0: the schedule's own number."""

    schedule: str
    pp: int
    chunks: int = 0

    @property
    def name(self) -> str:
        return f"{self.schedule}-pp{self.pp}"

    def plan(self, num_microbatches: int) -> Schedule:
        """What every rank does."""
        return check(lower(generate(self.schedule, self.pp, num_microbatches, self.chunks)))


CASES = tuple(
    Case(schedule, pp, 2 if schedule == "interleaved" else 0)
    for pp in (2, 4)
    for schedule in ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipe-v")
)


@dataclass(frozen=True)
class Bubble:
    """One benchmark: idle shares of all ranks' time, predicted once and measured in each round."""

    name: str
    predicted: float
    p2p_s: float
    measured: tuple[float, ...]
    settings: Mapping[str, object]

    @property
    def median(self) -> float:
        return statistics.median(self.measured)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third, of what was measured."""
        return quartiles_of(self.measured)

    @property
    def error(self) -> float:
        """By how much the measured median is larger, as a share of the prediction."""
        return self.median / self.predicted - 1


def check_settings(milliseconds: Sequence[float], num_microbatches: int) -> Seconds:
    """The durations in seconds. Raises ValueError for times that nothing can take, or no microbatches."""
    if min(milliseconds) <= 0:
        raise ValueError(f"--milliseconds={' '.join(map(str, milliseconds))} must all be greater than 0")
    if num_microbatches < 1:
        raise ValueError(f"--microbatches={num_microbatches} must be at least 1")
    return Seconds(*(each / 1000 for each in milliseconds))


def measure(info: RankInfo, case_name: str, seconds: Seconds, num_microbatches: int, rounds: int, result: str) -> None:
    """One rank's part of a case; rank 0 writes the bubble of every round to the JSON file ``result``."""
    torch.set_num_threads(1)
    process_group.start(info, torch.device("cpu"))
    try:
        p2p, timelines = run_rounds(info, case_named(case_name, CASES).plan(num_microbatches), seconds, rounds)
        if info.rank == 0:
            found = {"p2p_s": p2p, "bubbles": [timeline.bubble_fraction for timeline in timelines]}
            Path(result).write_text(json.dumps(found))
    finally:
        process_group.stop()  # with all that held groups gone


def run_rounds(info: RankInfo, schedule: Schedule, seconds: Seconds, rounds: int) -> tuple[float, list[Timeline]]:
    """Seconds that a message costs, and of each round when every rank's instructions ran."""
    mesh = ParallelMesh.build(Layout(pp=info.world_size), info.rank, torch.device("cpu"))
    engine = sleeping_engine(schedule, seconds, mesh)
    run_once(engine, schedule, mesh)  # the first messages make connections
    return message_seconds(seconds, mesh), [run_once(engine, schedule, mesh) for _ in range(rounds)]


@torch.no_grad()
def message_seconds(seconds: Seconds, mesh: ParallelMesh) -> float:
    """The median time from the end of a stage to the start of the next one, on another rank that waits for it."""
    ranks = range(mesh.pp.size)
    through = lower(forward_only(ranks, 1))
    engine, gaps = sleeping_engine(through, seconds, mesh), []
    for _ in range(PINGS):
        timeline = run_once(engine, through, mesh)
        spans = [
            (start[c][0], end[c][0])
            for start, end, c in zip(timeline.start, timeline.end, map(timeline.computing, ranks))
        ]
        gaps += [after - before for (_, before), (after, _) in pairwise(spans)]
    return max(0.0, statistics.median(gaps))  # hosts' clocks agree to some microseconds only


def sleeping_engine(schedule: Schedule, seconds: Seconds, mesh: ParallelMesh) -> PipelineEngine:
    """The engine of one rank, with stages that sleep and nothing to sum or update."""
    wgrad, last = WeightGradients(), schedule.num_stages - 1
    stages: dict[int, Any] = {
        number: SleepingStage(seconds, HIDDEN, wgrad, number == 0, number == last)
        for number, home in enumerate(schedule.home)
        if home == mesh.pp.rank
    }
    actions = Actions(reduce=nothing, tied=nothing, optimize=nothing)
    return PipelineEngine(stages, schedule.num_stages, mesh.pp, wgrad, mesh.device, actions)


def run_once(engine: PipelineEngine, schedule: Schedule, mesh: ParallelMesh) -> Timeline:
    """One step, on all ranks together."""
    token_bs = torch.zeros(1, TOKENS, dtype=torch.int64)
    microbatches = [Inputs(token_bs, token_bs, torch.zeros(1, dtype=torch.int64))] * schedule.num_microbatches
    steps = engine.compile(schedule.ranks[mesh.pp.rank])
    clock = StepClock(mesh)
    engine.run(steps, microbatches, marks=clock.marks)
    return clock.read(schedule)


def collect(case: Case, seconds: Seconds, num_microbatches: int, result: Path) -> Bubble:
    """What ``measure`` wrote, beside the prediction."""
    schedule = case.plan(num_microbatches)
    backward = seconds.input_grad + seconds.weight_grad
    found = json.loads(result.read_text())
    durations = Durations(backward=backward, p2p=found["p2p_s"], **asdict(seconds))
    predicted = simulate(schedule, durations).bubble_fraction
    settings = {
        "processes": case.pp,
        "stages": schedule.num_stages,
        "microbatches": num_microbatches,
        **{f"{name}_s": value for name, value in asdict(seconds).items()},
    }
    return Bubble(case.name, predicted, found["p2p_s"], tuple(found["bubbles"]), settings)
