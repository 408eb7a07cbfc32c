"""The plain model under FSDP2's `fully_shard`: ZeRO-3, or ZeRO-2 where parameters stay after forward.

Units as torchtitan cuts them: the embedding, each block, and the norm with the output matrix, which stay in any case
between their forward and the backward that follows at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from megacore.bench.baselines.accumulating import Sums, accumulating_step
from megacore.bench.baselines.plain_llama import PlainLlama, Step, adamw
from megacore.config.schema import OptimConfig


def shard(model: PlainLlama, mesh: DeviceMesh, free_after_forward: bool, sum_each: bool) -> Sums:
    """Cuts the model over a one-dimensional mesh, in place.

    ``sum_each``: gradients are summed and cut after every microbatch. Else whole ones add up until the last, as
    `fully_shard` documents it for gradient accumulation (`set_requires_gradient_sync`): fewer messages, more memory.
    """
    for unit in (model.tok_embeddings, *model.layers):
        fully_shard(unit, mesh=mesh, reshard_after_forward=free_after_forward)
    fully_shard([model.norm, model.output], mesh=mesh, reshard_after_forward=False)
    whole = fully_shard(model, mesh=mesh, reshard_after_forward=free_after_forward)
    assert isinstance(whole, FSDPModule)

    @contextmanager
    def sums(last: bool) -> Iterator[None]:
        whole.set_is_last_backward(last)
        whole.set_requires_gradient_sync(last or sum_each)
        yield

    return sums


def sharded_step(
    model: PlainLlama,
    config: OptimConfig,
    num_microbatches: int,
    mesh: DeviceMesh,
    free_after_forward: bool,
    sum_each: bool = True,
) -> Step:
    """Each rank gives its own share of the batch."""
    sums = shard(model, mesh, free_after_forward, sum_each)
    optimizer = adamw(model.parameters(), config, fused=True)
    return accumulating_step(model, optimizer, config.clip_grad, num_microbatches, sums)
