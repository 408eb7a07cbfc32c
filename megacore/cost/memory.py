"""Memory of a run, for each rank of its pipeline: of the ranks that share a pipeline rank, the one that holds most.

State is the engine's own arithmetic (``spec/memory.py``), an activation's bytes are ``spec/activations.py``'s, and how
many microbatches are alive is the schedule's (``cost/live.py``). On top of what waits for its backward comes what a
block needs while it goes through it, and what travels. All of it is looked up by kind of block, so that pricing one
more layout takes little.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np

from megacore.config.resolve import window_of
from megacore.config.schema import ModelConfig, OptimConfig, PrecisionConfig, RunConfig
from megacore.cost.live import Live, live_of_kind
from megacore.cost.practice import Practice
from megacore.layout.layout import Layout
from megacore.layout.policy import ShardingPolicy
from megacore.spec.activations import activation_bytes, host_activation_bytes, late_bytes
from megacore.spec.memory import ITEM_BYTES, StateBytes, state_bytes
from megacore.spec.model import ModelSpec, is_mixture
from megacore.spec.params import ParamSpec
from megacore.spec.stages import layers_of_stages

GIB = 1 << 30
CHUNK_LOGITS = 1 << 20
"""Logits that the loss makes at once: ``parallel.cross_entropy.CHUNK``."""
UNITS_OF_GRADS = 3
"""Units whose whole gradients are there at once under ZeRO-2 and 3: one in backward, two that are being summed."""
UNITS_OF_PARAMS = 2
"""Units whose whole parameters are there at once under ZeRO-3: the one at work and the next."""
MESSAGES = 4
"""Parcels on their way: two that leave, two that come."""
BYTES_PER_TOKEN = 16
"""A token and its label."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one device. ``host`` is in host memory and no part of ``total``; ``context`` is what is taken besides
    tensors: by the driver, libraries and NCCL."""

    params: int
    grads: int
    optimizer: int
    activations: int
    buffers: int
    fragmentation: int
    context: int
    host: int = 0

    @property
    def allocated(self) -> int:
        """All tensors, as torch.cuda.max_memory_allocated counts them."""
        return self.params + self.grads + self.optimizer + self.activations + self.buffers

    @property
    def reserved(self) -> int:
        """What torch's allocator takes for them."""
        return self.allocated + self.fragmentation

    @property
    def total(self) -> int:
        """All that the device must have."""
        return self.reserved + self.context


class Cut(NamedTuple):
    """How a parameter's state is dealt out."""

    tp: int
    ep: int
    etp: int
    zero: int
    shards: int
    expert_shards: int


class Sizes(NamedTuple):
    """Of what one rank has of a unit: elements of parameters, what of them multiplies in FP8, and bytes of state."""

    numel: int
    in_fp8: int
    state: StateBytes


Unit = tuple[str, int]
"""("embedding", 0), ("block", a layer that stands for all like it), ("head", 0), ("tied", 0)."""


def memory_by_rank(config: RunConfig, layout: Layout, practice: Practice = Practice()) -> tuple[RankMemory, ...]:
    """What each pipeline rank of a resolved run needs at its worst moment. Raises ValueError where the layers cannot be
    cut into the layout's stages."""
    pricing = _Pricing(config, layout, practice)
    t = config.train
    microbatches = max(1, t.global_batch_size // (t.micro_batch_size * layout.dp))
    lives = live_of_kind(config.parallel.schedule, layout.pp, microbatches, layout.chunks)
    return tuple(pricing.rank(live, microbatches) for live in lives)


@dataclass(frozen=True)
class _Pricing:
    """One layout's prices."""

    config: RunConfig
    layout: Layout
    practice: Practice

    def rank(self, live: Live, microbatches: int) -> RankMemory:
        units = self.units_of(live.stages)
        state = [(self.sizes(unit).state, count) for unit, count in units.items()]
        params, grads, optimizer, host = (
            sum(getattr(one, name) * count for one, count in state) for name in ("params", "grads", "optimizer", "host")
        )
        activations = self.activations(live) + self.working(units)
        buffers = self.buffers(live, units, microbatches)
        waste = int(self.practice.waste * (activations + buffers))
        context = int(self.practice.context_gb * 1e9)
        return RankMemory(
            params, grads, optimizer, activations, buffers, waste, context, host + self.host_activations(live)
        )

    @property
    def item(self) -> int:
        return ITEM_BYTES[self.config.precision.dtype]

    @property
    def num_stages(self) -> int:
        return self.layout.num_stages

    @property
    def tokens(self) -> int:
        """Of a microbatch on one rank, inside the matrices."""
        t = self.config.train
        return t.micro_batch_size * t.seq_len // self.layout.cp

    @property
    def boundary(self) -> int:
        """Bytes that a stage hands on."""
        split = self.layout.tp if self.config.parallel.sequence_parallel else 1
        return self.tokens // split * self.config.model.hidden_size * self.item

    def units_of(self, stages: tuple[int, ...]) -> dict[Unit, int]:
        """How many units of each kind lie on a rank."""
        config, last = self.config, self.num_stages - 1
        of_stages = _kinds_of_stages(config.model, config.train.seq_len, self.num_stages, config.parallel.stage_layers)
        units: dict[Unit, int] = {}
        for stage in stages:
            for layer, count in of_stages[stage]:
                units["block", layer] = units.get(("block", layer), 0) + count
        if 0 in stages:
            units["embedding", 0] = 1
        if last in stages:
            units["head", 0] = 1
            if config.model.tie_embeddings and 0 not in stages:
                units["tied", 0] = 1
        return units

    def sizes(self, unit: Unit) -> Sizes:
        config, layout = self.config, self.layout
        shards = layout.dp_shard * (layout.cp if self.practice.shards_over_cp else 1)
        cut = Cut(layout.tp, layout.ep, layout.etp, layout.zero, shards, max(1, layout.edp // layout.dp_replicate))
        return _sizes(unit, config.model, config.optim, config.precision, self.practice, cut)

    def of_block(self, layer: int, recompute: str) -> int:
        """What waits of a microbatch in a block."""
        config, layout = self.config, self.layout
        return _block_bytes(
            config.model,
            config.train.seq_len,
            config.train.micro_batch_size,
            layout.tp,
            config.parallel.sequence_parallel,
            recompute,
            self.item,
            config.parallel.regather_inputs,
            layout.zero >= 2,
            layer,
            layout.cp,
            layout.etp,
            self.practice.attention,
        )

    def activations(self, live: Live) -> int:
        """Of all microbatches that are alive at the worst moment."""
        config, layout = self.config, self.layout
        model, t = config.model, config.train
        kinds = _kinds_of_stages(model, t.seq_len, self.num_stages, config.parallel.stage_layers)
        kept, late = np.zeros(len(live.stages), dtype=np.int64), np.zeros(len(live.stages), dtype=np.int64)
        for chunk, stage in enumerate(live.stages):
            for layer, count in kinds[stage]:
                kept[chunk] += count * self.of_block(layer, config.parallel.recompute)
                late[chunk] += count * late_bytes(
                    model, t.seq_len, t.micro_batch_size, layout.tp, self.item, layer, layout.cp, layout.etp
                )
            if stage == self.num_stages - 1:
                kept[chunk] += self.boundary + self.tokens * model.hidden_size * self.item
        return live.peak(kept, late)

    def working(self, units: dict[Unit, int]) -> int:
        """What one block needs while it goes through backward."""
        config = self.config
        layers = [layer for kind, layer in units if kind == "block"]
        remade = 0
        if config.parallel.recompute in ("full", "selective", "offload"):
            remade = max(
                (self.of_block(each, "none") - self.of_block(each, config.parallel.recompute) for each in layers),
                default=0,
            )
        m, width = config.model, config.model.ffn_hidden_size // self.layout.tp
        return remade + (self.tokens * 2 * width * self.item + 2 * self.boundary if layers else 0)

    def buffers(self, live: Live, units: dict[Unit, int], microbatches: int) -> int:
        config, layout, practice = self.config, self.layout, self.practice
        policy = ShardingPolicy.of(layout.zero)
        total = microbatches * self.tokens * BYTES_PER_TOKEN
        if layout.pp > 1:
            total += MESSAGES * self.boundary
        numels = {unit: self.sizes(unit).numel for unit in units}
        whole = 4 if self.item == 2 else self.item
        for unit, numel in numels.items():
            if policy.grads:
                total += numel * int(practice.grad_bytes or whole) * min(UNITS_OF_GRADS, units[unit])
            if policy.params:
                total += numel * self.item * min(UNITS_OF_PARAMS, units[unit])
        if self.num_stages - 1 in live.stages:
            column = live.stages.index(self.num_stages - 1)
            logits = self.tokens * -(-config.model.vocab_size // layout.tp)
            total += int(live.kept[:, column].max(initial=0)) * int(logits * (practice.logit_bytes or self.item))
            total += 2 * 4 * min(CHUNK_LOGITS, logits)
        in_fp8 = [self.sizes(unit).in_fp8 * (1 if policy.params else count) for unit, count in units.items()]
        return total + (max(in_fp8, default=0) if policy.params else sum(in_fp8))

    def host_activations(self, live: Live) -> int:
        if self.config.parallel.recompute != "offload":
            return 0
        config, layout, t = self.config, self.layout, self.config.train
        kinds = _kinds_of_stages(config.model, t.seq_len, self.num_stages, config.parallel.stage_layers)
        cut = (layout.tp, config.parallel.sequence_parallel, self.item, config.parallel.regather_inputs)
        each = [
            sum(
                count
                * host_activation_bytes(config.model, t.seq_len, t.micro_batch_size, *cut, layer, layout.cp, layout.etp)
                for layer, count in kinds[stage]
            )
            for stage in live.stages
        ]
        return live.peak(np.array(each), np.zeros(len(each), dtype=np.int64))


@cache
def _spec(model: ModelConfig) -> ModelSpec:
    return ModelSpec.of(model)


@cache
def _kinds_of_stages(
    model: ModelConfig, seq_len: int, num_stages: int, stage_layers: tuple[int, ...]
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """(a layer that stands for all like it, how many of them) of each stage."""
    like: dict[tuple[bool, int], int] = {}
    of_layer = [like.setdefault((is_mixture(model, n), window_of(model, n)), n) for n in range(model.num_layers)]
    kinds = []
    for layers in layers_of_stages(model, seq_len, num_stages, stage_layers):
        counts: dict[int, int] = {}
        for layer in layers:
            counts[of_layer[layer]] = counts.get(of_layer[layer], 0) + 1
        kinds.append(tuple(counts.items()))
    return tuple(kinds)


@cache
def _block_bytes(
    model: ModelConfig,
    seq_len: int,
    micro_batch_size: int,
    tp: int,
    sequence: bool,
    recompute: str,
    item: int,
    regather: bool,
    by_unit: bool,
    layer: int,
    cp: int,
    etp: int,
    attention: str,
) -> int:
    if attention == "explicit":
        # scores as Korthikanti et al. 2022, equation 1, has them: softmax, mask and what is left
        return _explicit_bytes(model, seq_len, micro_batch_size, tp, sequence, recompute, item, layer, cp)
    return activation_bytes(
        model, seq_len, micro_batch_size, tp, sequence, recompute, item, regather, by_unit, layer, cp, etp
    )


def _explicit_bytes(
    model: ModelConfig,
    seq_len: int,
    micro_batch_size: int,
    tp: int,
    sequence: bool,
    recompute: str,
    item: int,
    layer: int,
    cp: int,
) -> int:
    plain = replace(model, dropout=0.0, attention_dropout=0.0)
    kept = activation_bytes(plain, seq_len, micro_batch_size, tp, sequence, recompute, item, layer=layer, cp=cp)
    tokens = seq_len * micro_batch_size // cp
    if recompute != "full" and model.dropout:
        kept += 2 * tokens // (tp if sequence else 1) * model.hidden_size
    if recompute == "none":
        kept += tokens * seq_len * (model.num_heads // tp) * (5 if model.attention_dropout else 2)
    return kept


@cache
def _sizes(
    unit: Unit, model: ModelConfig, optim: OptimConfig, precision: PrecisionConfig, practice: Practice, cut: Cut
) -> Sizes:
    """What a rank that holds most has of a unit."""
    spec, (kind, layer) = _spec(model), unit
    params = {
        "embedding": spec.embedding.params,
        "tied": spec.embedding.params[:1],
        "head": spec.head.params,
    }.get(kind) or spec.blocks[layer].params
    dense = [param for param in params if not param.experts]
    experts = [_on_rank(param, cut.ep) for param in params if param.experts]
    numel = in_fp8 = 0
    state = StateBytes(0, 0, 0)
    for some, tp, shards in ((dense, cut.tp, cut.shards), (experts, cut.etp, cut.expert_shards)):
        held = state_bytes(
            some, optim, precision.dtype, 0, tp, cut.zero, shards, master=precision.master, device="cuda"
        )
        local = sum(param.local_numel(0, tp) for param in some)
        numel += local
        if precision.fp8 != "off" and kind == "block":
            in_fp8 += 2 * sum(param.local_numel(0, tp) for param in some if param.is_matmul)
        held = _practised(held, local, practice, cut.zero, shards)
        state = StateBytes(*(a + b for a, b in zip(_parts(state), _parts(held), strict=True)))
    return Sizes(numel, in_fp8, state)


def _parts(state: StateBytes) -> tuple[int, int, int, int, int]:
    return state.params, state.grads, state.optimizer, state.host, state.files


def _practised(state: StateBytes, numel: int, practice: Practice, zero: int, shards: int) -> StateBytes:
    """State as another software has it."""
    policy, own = ShardingPolicy.of(zero), -(-numel // shards)
    changes = {}
    if practice.param_bytes:
        changes["params"] = int(practice.param_bytes * (own if policy.params else numel))
    if practice.grad_bytes:
        changes["grads"] = int(practice.grad_bytes * (own if policy.grads else numel))
    if practice.optimizer_bytes:
        changes["optimizer"] = int(practice.optimizer_bytes * (own if policy.optimizer else numel))
    return replace(state, **changes)


def _on_rank(param: ParamSpec, ep: int) -> ParamSpec:
    """The experts that one of ``ep`` ranks has."""
    return replace(param, shape=(-(-param.experts // ep), *param.shape[1:]))
