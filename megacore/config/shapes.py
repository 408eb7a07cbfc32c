"""The rules of a model's shape: by itself, and against tensor parallelism, the length of samples and the loss."""

from collections.abc import Iterator

from megacore.config.near import divisors, multiples, nearest
from megacore.config.resolve import resolve_model, rotary_dims
from megacore.config.schema import ModelConfig, RunConfig


def model_problems(config: RunConfig) -> Iterator[str]:
    """The shape of the model, by itself and against the layout."""
    given = config.model
    if not given.head_dim and given.hidden_size % given.num_heads:
        yield (
            f"model.num_heads={given.num_heads} does not divide model.hidden_size={given.hidden_size}; "
            f"use {divisors(given.hidden_size, given.num_heads)}, or give model.head_dim"
        )
        return
    m = resolve_model(given, config.train.seq_len)
    if m.num_heads % m.num_kv_heads:
        yield (
            f"model.num_kv_heads={m.num_kv_heads} does not divide model.num_heads={m.num_heads}; "
            f"use {divisors(m.num_heads, m.num_kv_heads)}"
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
            yield f"parallel.tp={tp} does not divide model.{name}={size}; use {divisors(size, tp)}"
    if m.num_kv_heads % tp and tp % m.num_kv_heads:
        legal = [n for n in range(1, m.num_heads + 1) if not (m.num_kv_heads % n and n % m.num_kv_heads)]
        yield (
            f"parallel.tp={tp} neither divides model.num_kv_heads={m.num_kv_heads} nor is a multiple of it; "
            f"use {nearest([n for n in legal if m.num_heads % n == 0], tp)}"
        )
    if config.parallel.sequence_parallel and config.train.seq_len % tp:
        yield (
            f"parallel.tp={tp} does not divide train.seq_len={config.train.seq_len}, which "
            f"parallel.sequence_parallel splits; use train.seq_len={multiples(tp, config.train.seq_len)}"
        )


def softcap_problems(config: RunConfig) -> Iterator[str]:
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
