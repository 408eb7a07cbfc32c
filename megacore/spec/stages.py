"""What each pipeline stage holds: layers, balanced by what the units really cost, and their parameters."""

from collections.abc import Collection, Sequence

from megacore.config.schema import ModelConfig
from megacore.layout.stages import stages_of_layers
from megacore.spec.flops import block_flops_per_token, unit_flops_per_token
from megacore.spec.model import ModelSpec
from megacore.spec.params import ParamSpec


def layers_of_stages(
    model: ModelConfig, seq_len: int, num_stages: int, stage_layers: tuple[int, ...] = ()
) -> tuple[range, ...]:
    """The layers that each of ``num_stages`` stages holds; the first also has the embedding, the last the head.

    ``model`` is resolved, its vocabulary known. ``stage_layers`` gives counts, else the FLOPs of samples of ``seq_len``
    tokens are balanced (backward costs twice the forward everywhere, so the forward's shares are those of training).

    Raises ValueError if the layers cannot be cut so.
    """
    flops = unit_flops_per_token(ModelSpec.of(model), seq_len)
    return stages_of_layers(
        model.num_layers, num_stages, stage_layers, flops.embedding / flops.block, flops.head / flops.block
    )


def flops_of_stages(model: ModelConfig, seq_len: int, stages: Sequence[range]) -> tuple[float, ...]:
    """Forward FLOPs per token of each stage that `layers_of_stages` made."""
    spec = ModelSpec.of(model)
    flops = unit_flops_per_token(spec, seq_len)
    costs = [sum(block_flops_per_token(spec, seq_len, layer) for layer in layers) for layers in stages]
    costs[0] += flops.embedding
    costs[-1] += flops.head
    return tuple(costs)


def params_of_stages(spec: ModelSpec, stages: Sequence[range], held: Collection[int]) -> tuple[ParamSpec, ...]:
    """The parameters of a rank that holds the stages ``held``, in global order.

    A tied output matrix is the embedding's, of which the last stage has a copy where the first is on another rank.
    """
    units = [spec.blocks[layer] for stage in sorted(held) for layer in stages[stage]]
    params = [param for unit in units for param in unit.params]
    if 0 in held:
        params = [*spec.embedding.params, *params]
    if len(stages) - 1 in held:
        tied = spec.config.tie_embeddings and 0 not in held
        params += [*(spec.embedding.params[:1] if tied else ()), *spec.head.params]
    return tuple(params)
