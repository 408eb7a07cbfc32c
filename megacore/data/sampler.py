"""Which samples belong to which step and rank: arithmetic on the global sample ordinal, no state.

A step's batch is the next so many samples. It is an ordered list of microbatches of consecutive samples, and
microbatch i belongs to dp rank i % dp_size. So another dp size deals the same samples out differently, and a batch
ramp only moves the borders between steps: no sample is lost or met twice.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from megacore.config.batch import batch_problems


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
        start: (first step, its first ordinal): where a run goes on that took other batches before.

    Raises:
        ValueError: the sizes do not divide as they must (see `batch_problems`).
    """

    def __init__(
        self,
        global_batch_size: int,
        micro_batch_size: int,
        batch_ramp: Sequence[int] = (),
        start: tuple[int, int] = (1, 0),
    ) -> None:
        assert min(global_batch_size, micro_batch_size) >= 1, (global_batch_size, micro_batch_size)
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.batch_ramp = tuple(batch_ramp)
        self.check(dp_size=1)
        self.stages = _stages(global_batch_size, batch_ramp, *start)
        self._first_steps = [stage.first_step for stage in self.stages]
        self._first_ordinals = [stage.first_ordinal for stage in self.stages]

    def batch(self, step: int) -> Batch:
        """The samples of a step; the first step is 1."""
        if step < self.stages[0].first_step:
            raise ValueError(f"step {step}: steps count from {self.stages[0].first_step}")
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
        """Microbatches of a step on each dp rank; `dp_size` is one that `check` takes."""
        size, share = self.batch(step).size, self.micro_batch_size * dp_size
        assert size % share == 0, f"a batch of {size} cannot be dealt out in {share}s: check(dp_size={dp_size}) says so"
        return size // share

    def check(self, dp_size: int) -> None:
        """Refuse a dp size that some batch of the run cannot be dealt out to.

        Raises:
            ValueError: as the constructor.
        """
        for problem in batch_problems(self.global_batch_size, self.micro_batch_size, self.batch_ramp, dp_size):
            raise ValueError(problem)

    def microbatches(self, step: int, dp_rank: int, dp_size: int) -> list[tuple[int, int]]:
        """(first ordinal, samples) of each microbatch of a step on one dp rank, in ascending order."""
        num, size = self.num_microbatches(step, dp_size), self.micro_batch_size
        first = self.batch(step).first_ordinal
        return [(first + (i * dp_size + dp_rank) * size, size) for i in range(num)]


def _stages(full: int, ramp: Sequence[int], step: int, consumed: int) -> list[RampStage]:
    """Megatron's rule: after `consumed` samples the batch has grown consumed / (samples / increments) times."""
    if not ramp or ramp[0] == full:
        return [RampStage(step, consumed, full)]
    start, increment, samples = ramp
    num = (full - start) // increment
    stages: list[RampStage] = []
    while True:
        grown = min(consumed * num // samples, num)
        size = start + grown * increment
        stages.append(RampStage(step, consumed, size))
        if grown == num:
            return stages
        missing = (grown + 1) * samples - consumed * num  # until the next growth, in samples x num
        steps = -(-missing // (num * size))
        step, consumed = step + steps, consumed + steps * size
