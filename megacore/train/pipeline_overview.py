"""The pipeline of a run in two lines: which stage holds what, and what its schedule costs in waiting and in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megacore.config.schema import RunConfig
from megacore.cost.simulate import Durations, simulate
from megacore.schedule.live import peak_activations
from megacore.schedule.schedule import Schedule
from megacore.spec import ModelSpec, ParamSpec
from megacore.spec.stages import flops_of_stages, layers_of_stages, params_of_stages
from megacore.train.schedule import draft_schedule, num_microbatches

MOST_RANKS = 8
"""Figures of more ranks are shortened to the largest."""

MOST_LETTERS = 100
"""A longer list of stages is shortened to its ends."""


@dataclass(frozen=True)
class Pipeline:
    """The stages of a resolved run and the schedule that its last batch size takes them through."""

    config: RunConfig
    stages: tuple[range, ...]
    schedule: Schedule

    @classmethod
    def of(cls, config: RunConfig) -> Pipeline:
        """Raises ValueError if the user's own schedule is wrong."""
        p = config.parallel
        stages = layers_of_stages(config.model, config.train.seq_len, p.pp * p.chunks, p.stage_layers)
        return cls(config, stages, draft_schedule(config, num_microbatches(config)))

    def params(self, spec: ModelSpec) -> list[tuple[ParamSpec, ...]]:
        """The parameters of each pipeline rank."""
        home = self.schedule.home
        held = [[stage for stage, its in enumerate(home) if its == rank] for rank in range(self.schedule.num_ranks)]
        return [params_of_stages(spec, self.stages, stages) for stages in held]

    def lines(self) -> list[str]:
        """What to say of it; nothing where there is one stage."""
        if len(self.stages) == 1:
            return []
        p = self.config.parallel
        ranks = f"{p.pp} ranks, {len(self.stages)} stages" if p.chunks > 1 else f"{p.pp} stages"
        return [
            f"stages   {stages_line(self.stages)}",
            f"schedule {self.schedule.kind}: {ranks}, {self.schedule.num_microbatches} microbatches; "
            f"bubble {self.bubble_fraction:.1%} (simulated); "
            f"{activations_line(peak_activations(self.schedule))}",
        ]

    @property
    def bubble_fraction(self) -> float:
        """Simulated, with stages as long as their FLOPs take and free messages."""
        flops = flops_of_stages(self.config.model, self.config.train.seq_len, self.stages)
        twice = tuple(2 * each for each in flops)
        durations = Durations(forward=flops, backward=twice, input_grad=flops, weight_grad=flops)
        return simulate(self.schedule, durations).bubble_fraction


def stages_line(stages: Sequence[range]) -> str:
    """What every stage holds: ``0: embedding + layers 0-3; 1: layers 4-7 + head``."""
    last = len(stages) - 1
    words = [f"{i}: {_units(layers, i == 0, i == last)}" for i, layers in enumerate(stages)]
    if len(words) > 2 and len("; ".join(words)) > MOST_LETTERS:
        counts = sorted({len(layers) for layers in stages[1:-1]})
        many = " or ".join(str(count) for count in counts)
        words[1:-1] = [f"1-{last - 1}: {many} layer{'s' if counts != [1] else ''} each"]
    return "; ".join(words)


def activations_line(peaks: Sequence[float]) -> str:
    """What each rank keeps at its worst: ``peaks`` [ranks], in microbatches of all of a rank's layers."""
    words = [f"{peak:.3g}" for peak in peaks]
    if len(set(words)) == 1:
        return f"activations of up to {words[0]} microbatch{'' if words[0] == '1' else 'es'} on each rank"
    if len(words) > MOST_RANKS:
        most = max(peaks)
        return f"activations of up to {most:.3g} microbatches, on rank {list(peaks).index(most)}"
    return f"activations of up to {', '.join(words)} microbatches on the ranks"


def _units(layers: range, first: bool, last: bool) -> str:
    names = ["embedding"] * first
    if layers:
        names.append(f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}")
    return " + ".join(names + ["head"] * last)
