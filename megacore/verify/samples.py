"""The one batch that all layouts are given: the run's first samples, or made-up ones."""

from dataclasses import replace

import torch
from torch import Tensor

from megacore.config.schema import RunConfig
from megacore.data.documents import IGNORE
from megacore.mesh.mesh import ParallelMesh
from megacore.model.inputs import Inputs
from megacore.train.data import open_data


def microbatches(config: RunConfig, mesh: ParallelMesh) -> list[Inputs]:
    """This rank's part of the first step, on its device."""
    if config.data.blend:
        return open_data(config, mesh).feed.step(1)
    return dealt(made_up(config), config, mesh.dp.rank, mesh.dp.size, mesh.device)


def made_up(config: RunConfig, step: int = 1) -> Inputs:
    """A whole global batch of ``step``, from the seed alone. Small tokens are frequent, so there is something to learn;
    some tokens are no targets, unevenly many per sample; documents begin where the run tells them apart."""
    generator = torch.Generator().manual_seed(config.train.seed + step)
    size, length = config.train.global_batch_size, config.train.seq_len
    chance = torch.rand((size, length + 1), generator=generator, dtype=torch.float64)
    tokens = (chance**6 * config.model.vocab_size).long()
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < torch.linspace(0, 0.6, size)[:, None]] = IGNORE
    starts = torch.rand(labels.shape, generator=generator) < 0.1
    places = torch.arange(length).expand(size, length)
    begin = torch.where(starts, places, 0).cummax(1).values
    return Inputs(
        token_bs=tokens[:, :-1].contiguous(),
        label_bs=labels,
        ordinal_b=torch.arange(size) + size * (step - 1),
        position_bs=places - begin if config.data.reset_positions else None,
        document_bs=starts.cumsum(1) if config.data.reset_attention else None,
    )


def dealt(whole: Inputs, config: RunConfig, dp_rank: int, dp_size: int, device: torch.device) -> list[Inputs]:
    """A rank's microbatches of a global batch: number i of the batch belongs to dp rank i % dp_size."""
    size = config.train.micro_batch_size
    firsts = range(dp_rank * size, config.train.global_batch_size, dp_size * size)

    def microbatch(first: int) -> Inputs:
        def part(tensor: Tensor) -> Tensor:
            return tensor[first : first + size].to(device)

        return replace(
            whole,
            token_bs=part(whole.token_bs),
            label_bs=part(whole.label_bs),
            ordinal_b=part(whole.ordinal_b),
            position_bs=None if whole.position_bs is None else part(whole.position_bs),
            document_bs=None if whole.document_bs is None else part(whole.document_bs),
        )

    return [microbatch(first) for first in firsts]
