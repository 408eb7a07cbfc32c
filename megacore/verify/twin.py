"""A tiny model that meets a layout the way the real one does: same family and features, same remainders.

What matters for a layout is what divides what, and what is left over: heads and kv heads over tp, layers over stages,
vocabulary rows and sequence over tp. The twin has the smallest sizes that leave all of that as it is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import lcm

from megacore.config.pipeline import num_chunks
from megacore.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig

HIDDEN, FFN, VOCAB, SEQ_LEN, HEAD_DIM, MICRO_BATCH = 24, 30, 96, 16, 4, 2
"""The twin's sizes, before remainders. The width is never split, so it needs none."""


def shrunk(run: RunConfig, layouts: Sequence[ParallelConfig]) -> RunConfig:
    """The twin of a run whose model is resolved and legal in ``layouts``. Its data are made up: it has other tokens."""
    tps = sorted({layout.tp for layout in layouts})
    m, t, every = run.model, run.train, lcm(*tps)
    seq_len = like(t.seq_len, every, SEQ_LEN)
    micro = min(MICRO_BATCH, t.micro_batch_size)
    data = DataConfig(
        reset_positions=run.data.reset_positions,
        reset_attention=run.data.reset_attention,
        mask_eod_loss=run.data.mask_eod_loss,
    )
    train = replace(
        t,
        seq_len=seq_len,
        micro_batch_size=micro,
        global_batch_size=t.global_batch_size // t.micro_batch_size * micro,
        batch_ramp=(),
    )
    num_kv_heads = _kv_heads(m, tps)
    model = replace(
        m,
        num_layers=_layers(m.num_layers, layouts),
        hidden_size=min(HIDDEN, m.hidden_size),
        ffn_hidden_size=like(m.ffn_hidden_size, every, FFN),
        num_heads=m.num_heads // m.num_kv_heads * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=min(HEAD_DIM - m.head_dim % 2, m.head_dim),
        vocab_size=like(m.vocab_size, every, VOCAB),
        max_positions=seq_len + min(3, max(0, m.max_positions - t.seq_len)),
        sliding_window=_scaled(m.sliding_window, t.seq_len, seq_len),
        rope_scaling=replace(
            m.rope_scaling, original_seq_len=_scaled(m.rope_scaling.original_seq_len, t.seq_len, seq_len)
        ),
    )
    return replace(run, model=model, train=train, data=data)


def like(size: int, every: int, least: int) -> int:
    """The smallest number from ``least`` on that leaves the remainder of ``size`` over ``every``; ``size`` at most."""
    return min(size, least + (size - least) % every)


def _layers(num_layers: int, layouts: Iterable[ParallelConfig]) -> int:
    """The fewest layers that all stages share out like ``num_layers``; all of them where a layout counts them."""
    stages = {layout.pp * num_chunks(layout) for layout in layouts}
    if any(layout.stage_layers for layout in layouts):
        return num_layers
    return like(num_layers, lcm(*stages), max(stages))


def _kv_heads(model: ModelConfig, tps: Iterable[int]) -> int:
    """The fewest kv heads that are split, or copied, over each tp as the model's are, with the same ratio of heads."""
    ratio = model.num_heads // model.num_kv_heads

    def same(kv: int, tp: int) -> bool:
        splits, copies = model.num_kv_heads % tp == 0, tp % model.num_kv_heads == 0
        return (kv % tp == 0, tp % kv == 0, kv * ratio % tp) == (splits, copies, 0)

    return next(kv for kv in range(1, model.num_kv_heads + 1) if all(same(kv, tp) for tp in tps))


def _scaled(length: int, seq_len: int, new_seq_len: int) -> int:
    """A length within a sequence, for the new sequence; 0 stays 0."""
    return length and max(1, length * new_seq_len // seq_len)


def describe(twin: RunConfig, run: RunConfig) -> str:
    """The twin's sizes, and the run's where they differ."""
    sizes = (
        ("layers", twin.model.num_layers, run.model.num_layers),
        ("hidden", twin.model.hidden_size, run.model.hidden_size),
        ("ffn", twin.model.ffn_hidden_size, run.model.ffn_hidden_size),
        ("heads", twin.model.num_heads, run.model.num_heads),
        ("kv heads", twin.model.num_kv_heads, run.model.num_kv_heads),
        ("head dim", twin.model.head_dim, run.model.head_dim),
        ("vocabulary", twin.model.vocab_size, run.model.vocab_size),
        ("sequence", twin.train.seq_len, run.train.seq_len),
        ("microbatch", twin.train.micro_batch_size, run.train.micro_batch_size),
    )
    return ", ".join(f"{name} {new}" + (f" (of {old})" if new != old else "") for name, new, old in sizes)
