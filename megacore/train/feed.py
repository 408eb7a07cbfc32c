"""From samples on disk to a rank's microbatches on its device."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from megacore.data.sampler import BatchPlan
from megacore.data.stream import MicroBatch, SampleStream
from megacore.mesh.group import Group
from megacore.model.inputs import Inputs


class Feed:
    """The microbatches of each step for one data-parallel rank: a function of the step and sample ordinals alone."""

    def __init__(self, stream: SampleStream, plan: BatchPlan, dp: Group, device: torch.device) -> None:
        self.stream, self.plan, self.dp, self.device = stream, plan, dp, device

    def step(self, step: int) -> list[Inputs]:
        """This rank's microbatches of 1-based ``step``, ascending."""
        spans = self.plan.microbatches(step, self.dp.rank, self.dp.size)
        return [self._to_device(self.stream.microbatch(first, count), training=True) for first, count in spans]

    def evaluation(self, num_batches: int, batch_size: int) -> Iterator[list[Inputs]]:
        """This rank's microbatches of the first ``num_batches`` batches, the same at every evaluation."""
        plan = BatchPlan(batch_size, self.plan.micro_batch_size)
        for step in range(1, num_batches + 1):
            spans = plan.microbatches(step, self.dp.rank, self.dp.size)
            yield [self._to_device(self.stream.microbatch(first, count), training=False) for first, count in spans]

    def _to_device(self, batch: MicroBatch, training: bool) -> Inputs:
        def tensor(array: np.ndarray) -> Tensor:
            host = torch.from_numpy(array)
            if self.device.type == "cuda":  # from memory that may be swapped out, the host would wait for the device
                host = host.pin_memory()
            return host.to(self.device, non_blocking=True)

        return Inputs(
            token_bs=tensor(batch.tokens),
            label_bs=tensor(batch.labels),
            ordinal_b=tensor(batch.ordinals),
            position_bs=None if batch.positions is None else tensor(batch.positions),
            document_bs=None if batch.documents is None else tensor(batch.documents),
            training=training,
        )
