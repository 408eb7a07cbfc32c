"""The plain model under DTensor tensor parallelism, by torchtitan's plans.

Two plans: "sequence" keeps activations between the matrices split along the sequence (reduce-scatter and all-gather),
"tensor" keeps them whole (all-reduce). Both split the vocabulary and use the loss-parallel cross-entropy. Which is
faster depends on the backend; a competent user tries both.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.nn import functional

from megacore.bench.baselines.plain_llama import PlainLlama, Step, adamw
from megacore.config.schema import ModelConfig, OptimConfig

PLANS = ("tensor", "sequence")


def parallelize(model: PlainLlama, mesh: DeviceMesh, plan: str) -> PlainLlama:
    """Turn the model's matrices into DTensors over the one-dimensional `mesh`, in place."""
    if plan not in PLANS:
        raise ValueError(f"plan={plan} is not a DTensor plan; take one of {', '.join(PLANS)}")
    between = Shard(1) if plan == "sequence" else Replicate()
    whole_model: dict[str, ParallelStyle] = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "output": ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
    }
    block: dict[str, ParallelStyle] = {
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=between),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w3": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=between),
    }
    # One DTensor feeds all matrices of a block, so that their input gradients are summed before they are reduced once.
    block["attention"] = PrepareModuleInput(
        input_layouts=(between, None, None), desired_input_layouts=(Replicate(), None, None)
    )
    block["feed_forward"] = PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),))
    if plan == "sequence":
        whole_model["norm"] = SequenceParallel()
        block["attention_norm"] = block["ffn_norm"] = SequenceParallel()
    parallelize_module(model, mesh, whole_model)
    for layer in model.layers:
        parallelize_module(layer, mesh, block)
    return model


def global_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Norm over all gradients. DTensors and plain tensors cannot share one foreach call, so each kind has its own."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    split = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    plain = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    total = torch.nn.utils.get_total_norm(split, foreach=True)
    total = total.full_tensor() if isinstance(total, DTensor) else total
    return torch.hypot(total, torch.nn.utils.get_total_norm(plain, foreach=True)) if plain else total


def dtensor_step(config: ModelConfig, optim: OptimConfig, seq_len: int, mesh: DeviceMesh, plan: str) -> Step:
    """A training step of the DTensor model; every rank gives the same tokens and labels."""
    model = parallelize(PlainLlama(config, seq_len), mesh, plan)
    parameters = list(model.parameters())
    kinds = ([p for p in parameters if isinstance(p, DTensor)], [p for p in parameters if not isinstance(p, DTensor)])
    optimizers = [adamw(kind, optim, fused=True) for kind in kinds if kind]

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        with loss_parallel():
            loss = functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
            loss.backward()
        if optim.clip_grad:
            norm = global_norm(parameters)
            for kind in kinds:
                torch.nn.utils.clip_grads_with_norm_(kind, optim.clip_grad, norm, foreach=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.full_tensor().detach() if isinstance(loss, DTensor) else loss.detach()

    return step
