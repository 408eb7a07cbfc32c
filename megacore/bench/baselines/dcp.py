"""The state of an FSDP2 model and its AdamW in torch.distributed.checkpoint, set up as its documentation does it."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.device_mesh import DeviceMesh

from megacore.bench.baselines.fsdp import shard
from megacore.bench.baselines.plain_llama import PlainLlama, adamw
from megacore.config.schema import RunConfig


class Checkpointed:
    """A sharded model with its optimizer's state, as one training step leaves it."""

    def __init__(self, config: RunConfig, mesh: DeviceMesh, group: ProcessGroup) -> None:
        self.group = group
        model = PlainLlama(config.model, config.train.seq_len)
        shard(model, mesh, free_after_forward=True, sum_each=True)
        optimizer = adamw(model.parameters(), config.optim, fused=True)
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
        optimizer.zero_grad()
        weights, state = get_state_dict(model, optimizer)
        self.state: dict[str, Any] = {"model": weights, "optim": state}

    def save(self, folder: str) -> None:
        """Durable when it returns: the writer's default is to sync files."""
        save(self.state, checkpoint_id=folder, process_group=self.group)

    def start_save(self, folder: str) -> Callable[[], object]:
        """Returns when state may change; what it gives waits for the end."""
        saving = async_save(self.state, checkpoint_id=folder, process_group=self.group)
        assert isinstance(saving, Future)
        return saving.result

    def load(self, folder: str) -> None:
        """Into the tensors that are there."""
        load(self.state, checkpoint_id=folder, process_group=self.group)
