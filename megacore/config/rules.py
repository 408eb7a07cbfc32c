"""The rules between keys: one function per subject, each a generator of lines that say what, value, rule and fix.

A rule reads only the keys named beside it in ``RULES``, and is run only when all of those are in range.
``world_size`` is None where the number of ranks does not matter yet.
"""

import math
from collections.abc import Callable, Iterator

from megacore.config.batch import batch_problems, multiples
from megacore.config.fp8 import fp8_problems
from megacore.config.kernels import kernel_problems
from megacore.config.mixtures import latent_problems, mixture_problems
from megacore.config.modules import module_problems
from megacore.config.offload import split_problem
from megacore.config.param_groups import param_group_problems
from megacore.config.pipeline import cut_problem, num_chunks, schedule_problems
from megacore.config.resolve import resolve_model, rotary_dims
from megacore.config.schema import ModelConfig, RunConfig
from megacore.config.settings import setting_problems
from megacore.config.watching import alert_problems, guard_problems, watching_problems

BLOCK = 64
"""Elements of a moment in 8 bits that share a scale: ``optim.quantise.BLOCK``."""

Rule = Callable[[RunConfig, int | None], Iterator[str]]


def _world(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """The sizes of the axes against the number of ranks."""
    p = config.parallel
    if world_size is None:
        return
    model_ranks = p.tp * p.pp * p.cp
    if world_size % model_ranks:
        more = (world_size // model_ranks + 1) * model_ranks
        fewer = more - model_ranks
        yield (
            f"parallel.tp*pp*cp={p.tp}*{p.pp}*{p.cp}={model_ranks} does not divide the {world_size} ranks; "
            f"start {f'{fewer} or {more}' if fewer else more} ranks"
        )
    elif p.dp and p.dp * model_ranks != world_size:
        yield (
            f"parallel.dp={p.dp} needs tp*pp*cp*dp={p.dp * model_ranks} ranks, but there are {world_size}; "
            f"leave dp out to derive {world_size // model_ranks}, or start {p.dp * model_ranks} ranks"
        )


def _model(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """The shape of the model, by itself and against the layout."""
    given = config.model
    if not given.head_dim and given.hidden_size % given.num_heads:
        yield (
            f"model.num_heads={given.num_heads} does not divide model.hidden_size={given.hidden_size}; "
            f"use {_divisors(given.hidden_size, given.num_heads)}, or give model.head_dim"
        )
        return
    m = resolve_model(given, config.train.seq_len)
    if m.num_heads % m.num_kv_heads:
        yield (
            f"model.num_kv_heads={m.num_kv_heads} does not divide model.num_heads={m.num_heads}; "
            f"use {_divisors(m.num_heads, m.num_kv_heads)}"
        )
    yield from _rotary(m)
    if m.position == "learned" and m.max_positions < config.train.seq_len:
        yield (
            f"train.seq_len={config.train.seq_len} exceeds model.max_positions={m.max_positions}; "
            f"use at most {m.max_positions}, or a larger table"
        )
    if m.top_k > m.num_experts:
        yield f"model.top_k={m.top_k} exceeds model.num_experts={m.num_experts}; use at most {m.num_experts}"
    yield from _rope_scaling(m)
    yield from _norms(m)
    yield from _tensor_parallel(m, config)


def _rotary(m: ModelConfig) -> Iterator[str]:
    """What is left of a head must be pairs of dims."""
    if m.position != "rope":
        if m.rotary_fraction != 1:
            yield (
                f"model.rotary_fraction={m.rotary_fraction} needs model.position=rope, not {m.position}; leave it out"
            )
        return
    dims = rotary_dims(m)
    if m.rotary_fraction == 1 and dims % 2:
        yield (
            f"model.head_dim={m.head_dim} is odd, but model.position=rope turns pairs of dims; "
            f"use {m.head_dim - 1 or 2} or {m.head_dim + 1}"
        )
    elif dims % 2 or not dims:
        near = [even for even in (dims - dims % 2, dims - dims % 2 + 2) if 0 < even <= m.head_dim]
        yield (
            f"model.rotary_fraction={m.rotary_fraction} turns {dims} of model.head_dim={m.head_dim} dims, but "
            f"model.position=rope turns pairs; use {' or '.join(str(even / m.head_dim) for even in near) or 1}"
        )


def _norms(m: ModelConfig) -> Iterator[str]:
    """Options of norms that contradict each other."""
    if m.norm_unit_offset and m.norm != "rmsnorm":
        yield f"model.norm_unit_offset=true is for model.norm=rmsnorm, not {m.norm}; leave it out"
    if m.qk_norm_over != "head" and not m.qk_norm:
        yield f"model.qk_norm_over={m.qk_norm_over} needs model.qk_norm=true; set it, or leave both out"


def _rope_scaling(m: ModelConfig) -> Iterator[str]:
    scaling = m.rope_scaling
    yield from _longrope(m)
    if scaling.type == "none":
        return
    if m.position != "rope":
        yield f"model.rope_scaling.type={scaling.type} needs model.position=rope, not {m.position}; leave it out"
    if scaling.type in ("yarn", "llama3", "longrope") and not scaling.original_seq_len:
        yield (
            f"model.rope_scaling.original_seq_len is missing, which type={scaling.type} needs; "
            "give the length that the model was first trained at"
        )
    if scaling.type == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
        yield (
            f"model.rope_scaling.low_freq_factor={scaling.low_freq_factor} is not below "
            f"high_freq_factor={scaling.high_freq_factor}; Llama 3.1 has 1 and 4"
        )
    if scaling.type == "yarn" and scaling.beta_slow >= scaling.beta_fast:
        yield (
            f"model.rope_scaling.beta_slow={scaling.beta_slow} is not below beta_fast={scaling.beta_fast}; "
            "the paper has 1 and 32"
        )
    if scaling.type == "ntk" and rotary_dims(m) == 2:
        # the base grows by factor^(d / (d - 2))
        yield (
            f"model.rope_scaling.type=ntk cannot slow the only pair of model.head_dim={m.head_dim} that turns; "
            "use at least 4 dims"
        )
    if scaling.type == "yarn" and m.rope_theta <= 1:
        yield (
            f"model.rope_theta={m.rope_theta} must be more than 1 with model.rope_scaling.type=yarn, which finds dims "
            "by their frequency; 10000 is usual"
        )


def _longrope(m: ModelConfig) -> Iterator[str]:
    """A factor for each pair, for short and for long samples."""
    scaling, pairs = m.rope_scaling, rotary_dims(m) // 2
    for name, factors in (("short_factor", scaling.short_factor), ("long_factor", scaling.long_factor)):
        if scaling.type != "longrope":
            if factors:
                yield f"model.rope_scaling.{name} is for type=longrope, not {scaling.type}; leave it out"
        elif len(factors) != pairs:
            yield (
                f"model.rope_scaling.{name} has {len(factors)} numbers; type=longrope needs {pairs}, "
                "one for each pair of a head's dims that turn"
            )
        elif min(factors, default=1) <= 0:
            yield f"model.rope_scaling.{name} holds {min(factors)}; all of its numbers must be more than 0"
    if scaling.type == "longrope" and scaling.original_seq_len == 1:
        yield "model.rope_scaling.original_seq_len=1 is too short for type=longrope; Phi-3 has 4096"


def _tensor_parallel(m: ModelConfig, config: RunConfig) -> Iterator[str]:
    tp = config.parallel.tp
    for name in ("num_heads", "ffn_hidden_size"):
        size = getattr(m, name)
        if size % tp:
            yield f"parallel.tp={tp} does not divide model.{name}={size}; use {_divisors(size, tp)}"
    if m.num_kv_heads % tp and tp % m.num_kv_heads:
        legal = [n for n in range(1, m.num_heads + 1) if not (m.num_kv_heads % n and n % m.num_kv_heads)]
        yield (
            f"parallel.tp={tp} neither divides model.num_kv_heads={m.num_kv_heads} nor is a multiple of it; "
            f"use {_nearest([n for n in legal if m.num_heads % n == 0], tp)}"
        )
    if config.parallel.sequence_parallel and config.train.seq_len % tp:
        yield (
            f"parallel.tp={tp} does not divide train.seq_len={config.train.seq_len}, which "
            f"parallel.sequence_parallel splits; use train.seq_len={multiples(tp, config.train.seq_len)}"
        )


def _mixture(config: RunConfig, world_size: int | None) -> Iterator[str]:
    yield from mixture_problems(config, world_size)
    yield from latent_problems(config.model)


def _layout(config: RunConfig, world_size: int | None) -> Iterator[str]:
    p, num_layers = config.parallel, config.model.num_layers
    if sorted(p.order.split("-")) != ["cp", "dp", "pp", "tp"] or not p.order.startswith("pp"):
        yield f"parallel.order={p.order} must begin with pp and name dp, cp and tp once each, as in pp-dp-cp-tp"
    if problem := cut_problem(num_layers, p.pp * num_chunks(p), p.stage_layers):
        yield problem
    if p.regather_inputs and not p.sequence_parallel:
        yield "parallel.regather_inputs=true needs parallel.sequence_parallel=true; set it, or leave both out"


def _schedule(config: RunConfig, world_size: int | None) -> Iterator[str]:
    yield from schedule_problems(config.parallel, config.train.batch_ramp)


def _zero(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """What ZeRO cuts, and what cannot be seen of lists that are walked by unit."""
    p, timeline_step = config.parallel, config.log.timeline_step
    dp = p.dp or (world_size or 0) // (p.tp * p.pp * p.cp)
    if p.dp_shard and dp % p.dp_shard:
        yield f"parallel.dp_shard={p.dp_shard} does not divide parallel.dp={dp}; use {_divisors(dp, p.dp_shard)}"
    if timeline_step and p.zero >= 2:
        yield (
            f"log.timeline_step={timeline_step} times stages, but parallel.zero={p.zero} walks them unit by unit; "
            "use parallel.zero=1, or leave timeline_step out"
        )


def _batch(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """The global batch against what all ranks compute at once, at every size that a ramp passes."""
    p, t = config.parallel, config.train
    dp = p.dp or (world_size or 0) // (p.tp * p.pp * p.cp)
    yield from batch_problems(t.global_batch_size, t.micro_batch_size, t.batch_ramp, dp or 1)


def _optim(config: RunConfig, world_size: int | None) -> Iterator[str]:
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


def _copied_heads(config: RunConfig, world_size: int | None) -> Iterator[str]:
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


def _clipping(config: RunConfig, world_size: int | None) -> Iterator[str]:
    o = config.optim
    if o.clip in ("value", "adagc") and not o.clip_grad:
        yield (
            f"optim.clip_grad={o.clip_grad} turns clipping off, but optim.clip={o.clip} asks for it; give a bound "
            "above 0, or optim.clip=none"
        )


def _offload(config: RunConfig, world_size: int | None) -> Iterator[str]:
    o = config.optim
    if problem := split_problem(config, config.train.device):
        yield problem
    if o.offload_folder and o.offload != "nvme":
        yield f'optim.offload_folder="{o.offload_folder}" is for optim.offload=nvme, not {o.offload}; leave it out'


def _param_groups(config: RunConfig, world_size: int | None) -> Iterator[str]:
    yield from param_group_problems(config.optim.groups)


def _precision(config: RunConfig, world_size: int | None) -> Iterator[str]:
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


def _fp8(config: RunConfig, world_size: int | None) -> Iterator[str]:
    yield from fp8_problems(config)


def _kernels(config: RunConfig, world_size: int | None) -> Iterator[str]:
    yield from kernel_problems(config)


def _modules(config: RunConfig, world_size: int | None) -> Iterator[str]:
    yield from module_problems(config)


def _softcap(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """Smoothed labels give every logit a gradient, which the soft cap's slope multiplies: no logit may be lost on the
    way to it, and what is kept of one is its exponential against the largest (see `parallel/cross_entropy.py`)."""
    cap, smoothing, dtype = config.model.logit_softcap, config.train.label_smoothing, config.precision.dtype
    largest = {"fp64": 354, "fp16": 4}.get(dtype, 43)  # e^(-2 cap) is a normal number
    if cap > largest and smoothing:
        yield (
            f"train.label_smoothing={smoothing} with model.logit_softcap={cap} needs numbers down to e^-{2 * cap:g}, "
            f"which precision.dtype={dtype} has not; use model.logit_softcap={largest} or less, "
            f"{'bf16, ' if dtype == 'fp16' and cap <= 43 else ''}or no smoothing"
        )


def _data(config: RunConfig, world_size: int | None) -> Iterator[str]:
    d = config.data
    legal = 1 <= len(d.split) <= 3 and min(d.split) >= 0 and d.split[0] > 0
    if not legal:
        yield (
            f"data.split={list(d.split)} must be one to three shares, of train, validation and test documents, of "
            "which the first is more than 0, such as [969, 30, 1]"
        )
    for key, blend in (("data.blend", d.blend), ("data.eval_blend", d.eval_blend)):
        if blend and (min(weight for weight, _ in blend) < 0 or not any(weight for weight, _ in blend)):
            weights = [weight for weight, _ in blend]
            yield f"{key} has the weights {weights}; they must be at least 0, and one of them more"
        if not all(prefix for _, prefix in blend):
            yield f"{key} has an empty prefix; give the path that PREFIX.bin and PREFIX.idx have in common"
    if config.train.eval_every and not d.eval_blend and legal and not any(d.split[1:2]):
        yield (
            f"train.eval_every={config.train.eval_every} needs validation data, but data.split={list(d.split)} leaves "
            "none; give data.eval_blend or a second share above 0"
        )
    if d.fim_rate and len(d.fim_tokens) != 3:
        yield f"data.fim_tokens={list(d.fim_tokens)} must name the prefix, middle and suffix tokens"


def _log(config: RunConfig, world_size: int | None) -> Iterator[str]:
    log = config.log
    if log.sample_every and not log.sample_prompts:
        yield (
            f"log.sample_every={log.sample_every} has no prompts to continue; give log.sample_prompts, or leave it out"
        )
    if log.sample_prompts and not log.sample_every:
        yield (
            f"log.sample_prompts={list(log.sample_prompts)} would never be continued with log.sample_every=0; give the "
            "steps between samples, or leave the prompts out"
        )
    if not all(log.sample_prompts):
        yield f"log.sample_prompts={list(log.sample_prompts)} has an empty prompt; give each at least one letter"
    if log.timeline_step > config.train.steps:
        yield (
            f"log.timeline_step={log.timeline_step} comes after the last step, train.steps={config.train.steps}; "
            f"use at most {config.train.steps}"
        )


def _watching(config: RunConfig, world_size: int | None) -> Iterator[str]:
    yield from watching_problems(config, world_size)
    yield from guard_problems(config)
    yield from alert_problems(config)


def _checkpoint(config: RunConfig, world_size: int | None) -> Iterator[str]:
    c = config.checkpoint
    if c.keep_best and not config.train.eval_every:
        yield (
            f"checkpoint.keep_best={c.keep_best} needs validation losses, but train.eval_every=0; evaluate at the "
            "steps of checkpoint.save_every, or leave it out"
        )
    if c.init_from and c.resume not in ("auto", "never"):
        yield (
            f"checkpoint.init_from={c.init_from} and checkpoint.resume={c.resume} both say what to begin with; resume "
            "goes on with everything, init_from takes weights alone: leave one out"
        )
    if not c.resume:
        yield 'checkpoint.resume="" must be auto, never or a path; leave it out for auto'


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _divisors(number: int, near: int) -> str:
    return _nearest([n for n in range(1, number + 1) if number % n == 0], near)


def _nearest(legal: list[int], near: int) -> str:
    """The legal values on both sides of ``near``."""
    below = [n for n in legal if n < near][-1:]
    above = [n for n in legal if n > near][:1]
    return " or ".join(map(str, below + above))


# Each rule with the keys that it reads: a section's name stands for all of its keys.
RULES: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (_world, ("parallel",)),
    (_model, ("model", "parallel", "train.seq_len")),
    (_mixture, ("model", "parallel", "train.seq_len")),
    (_layout, ("parallel", "model.num_layers")),
    (_schedule, ("parallel.chunks", "parallel.schedule", "train.batch_ramp")),
    (_zero, ("parallel", "log.timeline_step")),
    (_batch, ("parallel", "train")),
    (_optim, ("optim", "train.steps")),
    (_offload, ("optim.offload", "optim.offload_folder", "precision.master", "train.device")),
    (_copied_heads, ("model", "parallel.tp", "optim.state_dtype", "train.seq_len")),
    (_clipping, ("optim.clip", "optim.clip_grad")),
    (_param_groups, ("optim.groups",)),
    (_precision, ("precision",)),
    (
        _fp8,
        (
            *("model", "parallel.tp", "parallel.zero", "precision", "kernels.use", "log.statistics_every"),
            *("train.seq_len", "train.micro_batch_size"),
        ),
    ),
    (_kernels, ("kernels.use", "kernels.compile", "model", "optim.name", "parallel.tp")),
    (_modules, ("kernels.use", "parallel", "precision", "train.seq_len", "train.micro_batch_size")),
    (_softcap, ("model.logit_softcap", "train.label_smoothing", "precision.dtype")),
    (_data, ("data", "train.eval_every")),
    (_checkpoint, ("checkpoint", "train.eval_every")),
    (_log, ("log.sample_every", "log.sample_prompts", "log.timeline_step", "train.steps")),
    (
        _watching,
        ("log.profile", "log.profile_ranks", "log.nvtx", "log.communication", "train.steps", "train.device"),
    ),
)
