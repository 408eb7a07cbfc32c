"""The plain model under DistributedDataParallel: gradients bucketed and reduced while backward still runs."""

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from megacore.bench.baselines.plain_llama import PlainLlama, Step, training_step
from megacore.config.schema import ModelConfig, OptimConfig


def ddp_step(config: ModelConfig, optim: OptimConfig, seq_len: int, group: dist.ProcessGroup | None = None) -> Step:
    """Each rank gives its own share of the batch; gradients are averaged over `group`."""
    model = PlainLlama(config, seq_len)
    wrapped = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True, static_graph=True)
    return training_step(wrapped, optim)
