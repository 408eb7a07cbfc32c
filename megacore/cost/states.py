"""What a rank has of each unit of a model: elements, and bytes of state, by the engine's own arithmetic."""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

from megacore.config.resolve import window_of
from megacore.config.schema import ModelConfig, OptimConfig, PrecisionConfig
from megacore.cost.practice import Practice
from megacore.layout.policy import ShardingPolicy
from megacore.spec.fp8 import COPIES
from megacore.spec.memory import StateBytes, state_bytes
from megacore.spec.model import ModelSpec, is_mixture
from megacore.spec.params import ParamSpec
from megacore.spec.stages import layers_of_stages

Unit = tuple[str, int]
"""("embedding", 0), ("block", a layer that stands for all like it), ("head", 0), or ("tied", 0): the head's own copy of
the embedding's matrix."""


class Cut(NamedTuple):
    """How parameters are dealt out: the experts' over ep and etp, all others over tp; and how ZeRO cuts their state."""

    tp: int
    ep: int
    etp: int
    zero: int
    shards: int
    expert_shards: int


class UnitSizes(NamedTuple):
    """``numel`` elements are on a rank, or would be if nothing were sharded; ``fp8_bytes`` take their copies."""

    numel: int
    fp8_bytes: int
    params: int
    grads: int
    optimizer: int
    host: int


@cache
def spec_of(model: ModelConfig) -> ModelSpec:
    """The spec of a resolved model, made once."""
    return ModelSpec.of(model)


@cache
def kinds_of(model: ModelConfig, optim: OptimConfig, precision: PrecisionConfig) -> tuple[int, ...]:
    """For each layer, the first layer that is like it in all that memory depends on."""
    skipped = range(precision.fp8_skip_first), range(model.num_layers - precision.fp8_skip_last, model.num_layers)
    first: dict[tuple[object, ...], int] = {}
    kinds = []
    for layer in range(model.num_layers):
        frozen = layer if optim.freeze else 0  # patterns may name layers
        in_bf16 = precision.fp8 != "off" and any(layer in some for some in skipped)
        like = (is_mixture(model, layer), window_of(model, layer), in_bf16, frozen)
        kinds.append(first.setdefault(like, layer))
    return tuple(kinds)


@cache
def layers_of(model: ModelConfig, seq_len: int, num_stages: int, given: tuple[int, ...]) -> tuple[range, ...]:
    """The layers of each stage (``spec.stages.layers_of_stages``), found once."""
    return layers_of_stages(model, seq_len, num_stages, given)


@cache
def sizes_of(
    unit: Unit, model: ModelConfig, optim: OptimConfig, precision: PrecisionConfig, practice: Practice, cut: Cut
) -> UnitSizes:
    """Of the rank that holds most of a unit."""
    spec, (kind, layer) = spec_of(model), unit
    if kind == "block":
        params = spec.blocks[layer].params
    else:
        params = {"embedding": spec.embedding.params, "tied": spec.embedding.params[:1], "head": spec.head.params}[kind]
    in_fp8 = kind == "block" and _in_fp8(layer, model, precision)
    dense = [param for param in params if not param.experts]
    experts = [_on_rank(param, cut.ep) for param in params if param.experts]
    numel = multiplied = 0
    total = [0, 0, 0, 0]
    for some, tp, shards in ((dense, cut.tp, cut.shards), (experts, cut.etp, cut.expert_shards)):
        whole = sum(param.local_numel(0, tp) for param in some)
        numel += whole
        multiplied += sum(param.local_numel(0, tp) for param in some if param.is_matmul)
        held = state_bytes(
            some, optim, precision.dtype, 0, tp, cut.zero, shards, master=precision.master, device="cuda"
        )
        held = _practised(held, whole, practice, cut.zero, shards)
        total = [a + b for a, b in zip(total, (held.params, held.grads, held.optimizer, held.host), strict=True)]
    return UnitSizes(numel, COPIES * multiplied if in_fp8 else 0, *total)


def _in_fp8(layer: int, model: ModelConfig, precision: PrecisionConfig) -> bool:
    taken = range(precision.fp8_skip_first, model.num_layers - precision.fp8_skip_last)
    return precision.fp8 != "off" and layer in taken


def _practised(state: StateBytes, numel: int, practice: Practice, zero: int, shards: int) -> StateBytes:
    """State as another software has it."""
    policy, own = ShardingPolicy.of(zero), -(-numel // shards)
    held = own if policy.params else numel
    return replace(
        state,
        params=int(practice.param_bytes * held) or state.params,
        grads=int(practice.grad_bytes * (own if policy.grads else numel)) or state.grads,
        optimizer=int(practice.optimizer_bytes * (own if policy.optimizer else numel)) or state.optimizer,
    )


def _on_rank(param: ParamSpec, ep: int) -> ParamSpec:
    """The experts that one of ``ep`` ranks has."""
    return replace(param, shape=(-(-param.experts // ep), *param.shape[1:]))
