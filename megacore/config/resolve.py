"""Derived values: what a 0 in a run file stands for."""

import math
from dataclasses import replace
from functools import lru_cache

from megacore.config.pipeline import num_chunks
from megacore.config.schema import ModelConfig, OptimConfig, ParallelConfig, PrecisionConfig, RunConfig
from megacore.config.settings import resolve_settings

GATED = frozenset({"swiglu", "geglu"})


def resolve(config: RunConfig, world_size: int) -> RunConfig:
    """The run with every derived value filled in, for ``world_size`` ranks.

    The run must be legal (see `validate.check`). ``model.vocab_size`` stays 0 where it comes from the tokenizer.
    """
    return replace(
        config,
        model=resolve_model(config.model, config.train.seq_len),
        parallel=resolve_parallel(config.parallel, world_size),
        optim=resolve_optim(config.optim, config.train.steps),
        precision=resolve_precision(config.precision),
    )


def smallest_world(config: RunConfig) -> int:
    """The fewest ranks that the layout takes; at least 1, also where a size is out of range (validation says so)."""
    p = config.parallel
    return max(1, p.tp * p.pp * p.cp * (p.dp or 1))


@lru_cache(maxsize=256)
def resolve_model(model: ModelConfig, seq_len: int) -> ModelConfig:
    """The model with the widths that follow from others."""
    gated_width = math.ceil(8 * model.hidden_size / (3 * 64)) * 64
    width = gated_width if model.activation in GATED else 4 * model.hidden_size
    scaling = model.rope_scaling
    if scaling.type == "yarn" and not scaling.attention_factor:
        # YaRN (Peng et al. 2023), equation 22
        scaling = replace(scaling, attention_factor=0.1 * math.log(scaling.factor) + 1.0)
    if scaling.type == "longrope" and not scaling.attention_factor and scaling.original_seq_len > 1:
        # LongRoPE (Ding et al. 2024), as Phi-3's code has it
        ratio = math.log(scaling.factor) / math.log(scaling.original_seq_len)
        scaling = replace(scaling, attention_factor=math.sqrt(1 + ratio))
    model = _latent(replace(model, ffn_hidden_size=model.ffn_hidden_size or width))
    head_dim = model.head_dim or model.hidden_size // model.num_heads
    expert_width = (model.moe_ffn_hidden_size or model.ffn_hidden_size) if model.num_experts else 0
    return replace(
        model,
        moe_ffn_hidden_size=expert_width or model.moe_ffn_hidden_size,
        shared_ffn_hidden_size=model.shared_ffn_hidden_size or model.num_shared_experts * expert_width,
        num_kv_heads=model.num_kv_heads or model.num_heads,
        head_dim=head_dim,
        attention_scale_dim=model.attention_scale_dim or head_dim,
        max_positions=model.max_positions or seq_len,
        rope_scaling=scaling,
    )


def _latent(model: ModelConfig) -> ModelConfig:
    """The dims of a head in latent attention (DeepSeek-V2 2024, section 2.1, whose numbers are the usual ones)."""
    if not model.kv_lora_rank:
        return model
    without, rotated = model.qk_nope_head_dim or 128, model.qk_rope_head_dim or 64
    return replace(
        model,
        qk_nope_head_dim=without,
        qk_rope_head_dim=rotated,
        v_head_dim=model.v_head_dim or 128,
        head_dim=model.head_dim or without + rotated,
    )


def rotary_dims(model: ModelConfig) -> int:
    """How many of a head's dims RoPE rotates; the model is resolved."""
    return int(model.head_dim * model.rotary_fraction)


def window_of(model: ModelConfig, layer: int) -> int:
    """The sliding window of a layer, counted from 0; 0 where it sees everything."""
    every = model.full_attention_every
    sees_all = layer < model.sliding_window_from or (every and (layer + 1) % every == 0)
    return 0 if sees_all else model.sliding_window


def resolve_optim(optim: OptimConfig, steps: int) -> OptimConfig:
    """The update rule with all its hyper-parameters, and the lengths that follow from the run's. The final decay of wsd
    begins after the warm-up, so its length stays 0 where the warm-up takes all steps."""
    decay_steps = optim.decay_steps or steps
    tenth = min(max(1, decay_steps // 10), max(0, decay_steps - optim.warmup_steps))
    return replace(resolve_settings(optim), decay_steps=decay_steps, wsd_decay_steps=optim.wsd_decay_steps or tenth)


def resolve_precision(precision: PrecisionConfig) -> PrecisionConfig:
    """The formats with the loss scaling and the sums' format that follow from the numbers trained in."""
    scale = precision.loss_scale
    if scale == "auto":
        scale = "dynamic" if precision.dtype == "fp16" else "off"
    reduce = precision.grad_reduce_dtype
    if reduce == "auto":
        reduce = "fp64" if precision.dtype == "fp64" else "fp32"
    return replace(precision, loss_scale=scale, grad_reduce_dtype=reduce)


def resolve_parallel(parallel: ParallelConfig, world_size: int) -> ParallelConfig:
    """The layout with the sizes that the number of ranks and the schedule imply."""
    dp = parallel.dp or world_size // (parallel.tp * parallel.pp * parallel.cp)
    etp = parallel.etp or (parallel.tp if parallel.ep == 1 else 1)
    return replace(parallel, dp=dp, dp_shard=parallel.dp_shard or dp, etp=etp, chunks=num_chunks(parallel))
