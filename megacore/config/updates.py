"""The rules of how weights are updated: learning-rate schedules, clipping, state and its place, number formats."""

import math
from collections.abc import Iterator

from megacore.config.offload import split_problem
from megacore.config.resolve import resolve_model
from megacore.config.schema import RunConfig
from megacore.config.settings import setting_problems

BLOCK = 64
"""Elements of a moment in 8 bits that share a scale: ``optim.quantise.BLOCK``."""


def optim_problems(config: RunConfig) -> Iterator[str]:
    """Learning-rate schedule, the settings that the optimizer itself needs, and how its state is rounded."""
    o, steps = config.optim, config.train.steps
    end = o.decay_steps or steps
    # a run that is cut short inside its warm-up is a fair trial of a longer one
    if steps > end and o.warmup_steps > end:
        yield f"optim.warmup_steps={o.warmup_steps} exceeds optim.decay_steps={end}; use at most {end}"
    elif o.lr_schedule == "wsd" and o.wsd_decay_steps > max(0, end - o.warmup_steps):
        yield (
            f"optim.wsd_decay_steps={o.wsd_decay_steps} and warmup_steps={o.warmup_steps} do not fit into "
            f"{end} steps; use at most {max(0, end - o.warmup_steps)}"
        )
    if o.min_lr > o.lr:
        yield f"optim.min_lr={o.min_lr} exceeds optim.lr={o.lr}; use at most {o.lr}"
    yield from setting_problems(o)
    if o.state_rounding == "stochastic" and o.state_dtype != "bf16":
        yield (
            f"optim.state_rounding=stochastic needs optim.state_dtype=bf16, not {o.state_dtype}; "
            "set it, or leave both out"
        )


def copied_heads_problems(config: RunConfig) -> Iterator[str]:
    """Moments in 8 bits of kv heads that several tp ranks hold: a block that also has elements of other heads, which
    differ from rank to rank, would have another scale on each, and the copies would drift apart."""
    m, tp = resolve_model(config.model, config.train.seq_len), config.parallel.tp
    what, number = ("values in its bias", m.head_dim) if m.qkv_bias else ("weights", m.head_dim * m.hidden_size)
    if config.optim.state_dtype == "int8" and tp > m.num_kv_heads and number % BLOCK:
        yield (
            f"parallel.tp={tp} copies each of model.num_kv_heads={m.num_kv_heads}, whose {number} {what} are no "
            f"multiple of {BLOCK}, the elements that share a scale under optim.state_dtype=int8; use parallel.tp="
            f"{m.num_kv_heads} or less, or optim.state_dtype=bf16"
        )


def clipping_problems(config: RunConfig) -> Iterator[str]:
    """A way of clipping needs a bound."""
    o = config.optim
    if o.clip in ("value", "adagc") and not o.clip_grad:
        yield (
            f"optim.clip_grad={o.clip_grad} turns clipping off, but optim.clip={o.clip} asks for it; give a bound "
            "above 0, or optim.clip=none"
        )


def offload_problems(config: RunConfig) -> Iterator[str]:
    """Where optimizer state may wait."""
    o = config.optim
    if problem := split_problem(config, config.train.device):
        yield problem
    if o.offload_folder and o.offload != "nvme":
        yield f'optim.offload_folder="{o.offload_folder}" is for optim.offload=nvme, not {o.offload}; leave it out'


def precision_problems(config: RunConfig) -> Iterator[str]:
    """Loss scales and master weights against the number format."""
    p = config.precision
    if p.loss_scale not in ("auto", "off", "dynamic") and not _is_positive(p.loss_scale):
        yield f"precision.loss_scale={p.loss_scale} must be auto, dynamic, off or a number above 0, such as 1024"
    elif p.dtype == "fp16" and p.loss_scale == "off":
        yield (
            "precision.loss_scale=off loses small gradients with precision.dtype=fp16; use dynamic or a number, such "
            "as 1024"
        )
    elif p.dtype != "fp16" and p.loss_scale not in ("auto", "off"):
        yield (
            f"precision.loss_scale={p.loss_scale} is for precision.dtype=fp16; {p.dtype} has the range of gradients: "
            "leave it out"
        )
    elif p.dtype == "fp16" and p.loss_scale in ("auto", "dynamic") and p.loss_scale_start < p.loss_scale_min:
        yield (
            f"precision.loss_scale_start={p.loss_scale_start} is below loss_scale_min={p.loss_scale_min}; "
            f"use at least {p.loss_scale_min}"
        )
    if p.master != "fp32" and p.dtype != "bf16":
        yield f"precision.master={p.master} is for precision.dtype=bf16, not {p.dtype}; leave it out"


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
