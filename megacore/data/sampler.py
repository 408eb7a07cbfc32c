"""Which samples belong to which step and rank: arithmetic on the global sample ordinal, no state.

A step's batch is the next so many samples. It is an ordered list of microbatches of consecutive samples, and
microbatch i belongs to dp rank i % dp_size. So another dp size deals the same samples out differently, and a batch
ramp only moves the borders between steps: no sample is lost or met twice.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Batch:
    """The samples of one step."""

    first_ordinal: int
    size: int


@dataclass(frozen=True)
class RampStage:
    """Steps of one batch size."""

    first_step: int
    first_ordinal: int
    size: int


class BatchPlan:
    """The batch of every step.

    Args:
        global_batch_size: samples per step, after the ramp.
        micro_batch_size: samples that a rank computes at once.
        batch_ramp: [start, increment, samples]: the batch starts at `start` and grows by `increment`, up to
            `global_batch_size`, in equal shares of `samples` samples (Megatron's rampup-batch-size); empty: no ramp.

    Raises:
        ValueError: the sizes do not divide as they must.
    """

    def __init__(self, global_batch_size: int, micro_batch_size: int, batch_ramp: Sequence[int] = ()) -> None:
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        _check_sizes(global_batch_size, micro_batch_size, batch_ramp)
        self.stages = _stages(global_batch_size, batch_ramp)
        self._first_steps = [stage.first_step for stage in self.stages]
        self._first_ordinals = [stage.first_ordinal for stage in self.stages]

    def batch(self, step: int) -> Batch:
        """The samples of a step; the first step is 1."""
        if step < 1:
            raise ValueError(f"step {step}: steps count from 1")
        stage = self.stages[bisect_right(self._first_steps, step) - 1]
        return Batch(stage.first_ordinal + (step - stage.first_step) * stage.size, stage.size)

    def step_at(self, ordinal: int) -> int:
        """The step whose batch holds a sample."""
        stage = self.stages[bisect_right(self._first_ordinals, ordinal) - 1]
        return stage.first_step + (ordinal - stage.first_ordinal) // stage.size

    def num_samples(self, steps: int) -> int:
        """Samples that the first `steps` steps consume."""
        return self.batch(steps + 1).first_ordinal

    def num_microbatches(self, step: int, dp_size: int) -> int:
        """Microbatches of a step on each dp rank.

        Raises:
            ValueError: they cannot be dealt out equally.
        """
        size = self.batch(step).size
        share = self.micro_batch_size * dp_size
        if size % share:
            name = "train.batch_ramp" if size != self.global_batch_size else "train.global_batch_size"
            rule = f"is not a multiple of train.micro_batch_size={self.micro_batch_size} x dp={dp_size}"
            below, above = size // share * share, (size // share + 1) * share
            fix = f"{below} or {above}" if below else str(above)
            raise ValueError(f"{name}: the batch of {size} samples at step {step} {rule}; try {fix}")
        return size // share

    def check(self, dp_size: int) -> None:
        """Refuse a dp size that some batch of the run cannot be dealt out to.

        Raises:
            ValueError: as `num_microbatches`.
        """
        for stage in self.stages:
            self.num_microbatches(stage.first_step, dp_size)

    def microbatches(self, step: int, dp_rank: int, dp_size: int) -> list[tuple[int, int]]:
        """(first ordinal, samples) of each microbatch of a step on one dp rank, in ascending order."""
        num, size = self.num_microbatches(step, dp_size), self.micro_batch_size
        first = self.batch(step).first_ordinal
        return [(first + (i * dp_size + dp_rank) * size, size) for i in range(num)]


def _check_sizes(full: int, micro: int, ramp: Sequence[int]) -> None:
    if full < 1 or micro < 1:
        raise ValueError(f"train.global_batch_size={full} and train.micro_batch_size={micro} must be positive")
    if full % micro:
        rule = f"is not a multiple of train.micro_batch_size={micro}"
        raise ValueError(f"train.global_batch_size={full} {rule}; try {(full // micro + 1) * micro}")
    if not ramp:
        return
    what = f"train.batch_ramp={list(ramp)}"
    if len(ramp) != 3:
        raise ValueError(f"{what} needs three numbers: [start, increment, samples]")
    start, increment, samples = ramp
    if start < 1 or increment < 1 or samples < 0 or start > full:
        rule = f"needs 1 <= start <= train.global_batch_size={full}, increment >= 1 and samples >= 0"
        raise ValueError(f"{what} {rule}")
    if (full - start) % increment:
        rule = f"increment {increment} does not divide global_batch_size - start = {full - start}"
        raise ValueError(f"{what}: {rule}; choose an increment that does")
    if start % micro or increment % micro:
        raise ValueError(f"{what}: start and increment must be multiples of train.micro_batch_size={micro}")


def _stages(full: int, ramp: Sequence[int]) -> list[RampStage]:
    """Megatron's rule: after `consumed` samples the batch has grown consumed / (samples / increments) times."""
    if not ramp or ramp[0] == full or ramp[2] == 0:
        return [RampStage(1, 0, full)]
    start, increment, samples = ramp
    num = (full - start) // increment
    stages, step, consumed = [], 1, 0
    while True:
        grown = min(consumed * num // samples, num)
        size = start + grown * increment
        stages.append(RampStage(step, consumed, size))
        if grown == num:
            return stages
        missing = (grown + 1) * samples - consumed * num  # until the next growth, in samples x num
        steps = -(-missing // (num * size))
        step, consumed = step + steps, consumed + steps * size
