"""What matrix products in FP8 ask of a run."""

from collections.abc import Iterator
from dataclasses import fields

from megacore.config.kernels import wanted
from megacore.config.resolve import GATED, resolve_model
from megacore.config.schema import ModelConfig, PrecisionConfig, RunConfig

TRANSFORMER_ENGINE = "transformer-engine"
"""The backend of linear layers whose modules multiply in FP8 by themselves."""

MULTIPLE = 16
"""What tensor cores want sizes to be multiples of: ``kernels.fp8.products.MULTIPLE``."""

FOR_ANY, FOR_DELAYED = ("fp8_skip_first", "fp8_skip_last", "fp8_gather"), ("fp8_history", "fp8_margin")


def fp8_problems(config: RunConfig) -> Iterator[str]:
    """Lines about settings of FP8 that contradict each other, or the shape of what is multiplied."""
    p = config.precision
    yield from _idle(p)
    if p.fp8 == "off":
        return
    if p.dtype not in ("bf16", "fp32"):
        why = "scales the loss for a format that FP8 does not need" if p.dtype == "fp16" else "is more exact than FP8"
        yield f"precision.fp8={p.fp8} goes with bf16 or fp32; precision.dtype={p.dtype} {why}: use bf16"
    num_layers = config.model.num_layers
    if p.fp8_skip_first + p.fp8_skip_last >= num_layers:
        yield (
            f"precision.fp8_skip_first={p.fp8_skip_first} and fp8_skip_last={p.fp8_skip_last} leave none of "
            f"model.num_layers={num_layers} to precision.fp8={p.fp8}; skip fewer, or use fp8=off"
        )
    yield from _gather(config)
    if config.model.head_dim or not config.model.hidden_size % config.model.num_heads:
        yield from _shapes(resolve_model(config.model, config.train.seq_len), config)


def _gather(config: RunConfig) -> Iterator[str]:
    """What weights that travel in FP8 need."""
    p, linear = config.precision, wanted(config.kernels.use).get("linear", "")
    if not p.fp8_gather:
        return
    what = "precision.fp8_gather=true"
    if p.fp8 == "block":
        yield f"{what} needs one scale per weight, which precision.fp8=block has not; use current or delayed"
    if config.parallel.zero == 0:
        yield f"{what} needs shards to gather from, which parallel.zero=0 has not; use zero=1 or more, or leave it out"
    if config.log.statistics_every:
        yield (
            f"{what} leaves no weights to measure products in FP8 against, as "
            f"log.statistics_every={config.log.statistics_every} does; leave one of them out"
        )
    if linear == TRANSFORMER_ENGINE:
        yield f"{what} is for our own products in FP8, not those of kernels.use=linear={linear}; leave one of them out"


def _idle(p: PrecisionConfig) -> Iterator[str]:
    """What is set and would not be used."""
    default = {field.name: field.default for field in fields(p)}
    unused = [*FOR_ANY * (p.fp8 == "off"), *FOR_DELAYED * (p.fp8 != "delayed")]
    for name in unused:
        if getattr(p, name) != default[name]:
            needs = "precision.fp8=delayed" if name in FOR_DELAYED else "a precision.fp8"
            yield f"precision.{name}={getattr(p, name)} is for {needs}, not fp8={p.fp8}; set it, or leave both out"


def _shapes(m: ModelConfig, config: RunConfig) -> Iterator[str]:
    """Rows and columns of what a rank multiplies."""
    tp, t, fp8 = config.parallel.tp, config.train, config.precision.fp8
    tokens = t.micro_batch_size * t.seq_len
    sizes = [
        (tokens, f"train.micro_batch_size*seq_len={t.micro_batch_size}*{t.seq_len}={tokens} tokens", "train.seq_len"),
        (m.hidden_size, f"model.hidden_size={m.hidden_size}", "model.hidden_size"),
    ]
    if not m.num_heads % tp:
        heads, kv = m.num_heads // tp, max(1, m.num_kv_heads // tp)
        size = (heads + 2 * kv) * m.head_dim
        what = f"queries, keys and values of a rank, ({heads}+2*{kv})*model.head_dim={m.head_dim}: {size} rows,"
        sizes.append((size, what, "model.head_dim, or parallel.tp"))
        size = heads * m.head_dim
        sizes.append((size, f"a rank's heads, {heads}*model.head_dim={m.head_dim}: {size} columns,", "model.head_dim"))
    if not m.ffn_hidden_size % tp:
        size = m.ffn_hidden_size // tp
        gated = " (and twice as many)" * (m.activation in GATED)
        what = f"model.ffn_hidden_size/parallel.tp={m.ffn_hidden_size}/{tp}={size}{gated}"
        sizes.append((size, what, f"ffn_hidden_size={_near(m.ffn_hidden_size, MULTIPLE * tp)}"))
    for size, what, fix in sizes:
        if size % MULTIPLE:
            yield (
                f"precision.fp8={fp8} multiplies matrices whose sizes are multiples of {MULTIPLE}, which {what} "
                f"{'are' if what.endswith(('tokens', ',')) else 'is'} not; change {fix}, or use fp8=off"
            )


def _near(size: int, multiple: int) -> str:
    below = size // multiple * multiple
    return f"{below} or {below + multiple}" if below else str(multiple)
