"""DistributedDataParallel with an optimizer on every rank (ZeRO-0) or shared by ZeroRedundancyOptimizer (ZeRO-1).

The optimizer deals whole parameters out to the ranks and broadcasts them after its update; with
``parameters_as_bucket_view`` each rank's go in one message. Its option ``overlap_with_ddp`` updates inside of backward,
where the norm that clips is not known yet.
"""

from contextlib import AbstractContextManager, nullcontext

from torch.distributed import ProcessGroup
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from megacore.bench.baselines.accumulating import Sums, accumulating_step
from megacore.bench.baselines.plain_llama import PlainLlama, Step, adamw, decayed_groups
from megacore.config.schema import OptimConfig
from megacore.config.settings import settings


def replicate(
    model: PlainLlama, num_microbatches: int, group: ProcessGroup | None = None
) -> tuple[DistributedDataParallel, Sums]:
    """The model under DDP. Gradients are summed in the backward of the last microbatch (`no_sync` around the others);
    the graph is promised to be static only where there are no others."""
    wrapped = DistributedDataParallel(
        model, process_group=group, gradient_as_bucket_view=True, static_graph=num_microbatches == 1
    )

    def sums(last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else wrapped.no_sync()

    return wrapped, sums


def shared_adamw(model: DistributedDataParallel, config: OptimConfig) -> Optimizer:
    """torch's fused AdamW, each parameter on one rank of DDP's group."""
    own = settings(config)
    optimizer: Optimizer = ZeroRedundancyOptimizer(
        decayed_groups(model.parameters(), own["weight_decay"]),
        AdamW,
        model.process_group,
        parameters_as_bucket_view=True,
        lr=config.lr,
        betas=(own["beta1"], own["beta2"]),
        eps=own["eps"],
        fused=True,
    )
    return optimizer


def replicated_step(
    model: PlainLlama, config: OptimConfig, num_microbatches: int, shared: bool, group: ProcessGroup | None = None
) -> Step:
    """Each rank gives its own share of the batch. ``shared``: the optimizer's state is kept once."""
    wrapped, sums = replicate(model, num_microbatches, group)
    optimizer = shared_adamw(wrapped, config) if shared else adamw(wrapped.parameters(), config, fused=True)
    return accumulating_step(wrapped, optimizer, config.clip_grad, num_microbatches, sums)
