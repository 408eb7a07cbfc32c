"""A tiny model that meets a layout the way the real one does: same family and features, same remainders.

What matters for a layout is what divides what, and what is left over: heads and kv heads over tp, layers over stages,
vocabulary rows and sequence over tp. The twin has the smallest sizes that leave all of that as it is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import lcm

from megacore.config.pipeline import num_chunks
from megacore.config.resolve import rotary_dims
from megacore.config.schema import DataConfig, ModelConfig, ParallelConfig, RopeScaling, RunConfig

HIDDEN, FFN, VOCAB, SEQ_LEN, HEAD_DIM, MICRO_BATCH = 24, 30, 96, 16, 4, 2
"""The twin's sizes, before remainders. The width is never split, so it needs none."""


def shrunk(run: RunConfig, layout: ParallelConfig, layouts: Sequence[ParallelConfig]) -> RunConfig:
    """The twin, for one of ``layouts``, of a run that is legal in all of them and whose model is resolved.

    Twins for other layouts differ in their number of layers only. Its data are made up: it has other tokens.
    """
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
        num_layers=_layers(m.num_layers, layout),
        hidden_size=min(HIDDEN, m.hidden_size),
        ffn_hidden_size=like(m.ffn_hidden_size, every, FFN),
        num_heads=m.num_heads // m.num_kv_heads * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(m),
        vocab_size=like(m.vocab_size, every, VOCAB),
        max_positions=seq_len + min(3, max(0, m.max_positions - t.seq_len)),
        sliding_window=_scaled(m.sliding_window, t.seq_len, seq_len),
        full_attention_every=min(2, m.full_attention_every),
        sliding_window_from=_window_from(m),
    )
    model = replace(model, rope_scaling=_rope_scaling(m.rope_scaling, t.seq_len, model, seq_len))
    return replace(run, model=model, train=train, data=data)


def like(size: int, every: int, least: int) -> int:
    """The smallest number from ``least`` on that leaves the remainder of ``size`` over ``every``; ``size`` at most."""
    return min(size, least + (size - least) % every)


def _layers(num_layers: int, layout: ParallelConfig) -> int:
    """The fewest layers, two at least, that the stages share out like ``num_layers``; all, where the layout counts
    them."""
    num_stages = layout.pp * num_chunks(layout)
    return num_layers if layout.stage_layers else like(num_layers, num_stages, max(2, num_stages))


def _kv_heads(model: ModelConfig, tps: Iterable[int]) -> int:
    """The fewest kv heads that are split, or copied, over each tp as the model's are, with the same ratio of heads."""
    ratio = model.num_heads // model.num_kv_heads

    def same(kv: int, tp: int) -> bool:
        splits, copies = model.num_kv_heads % tp == 0, tp % model.num_kv_heads == 0
        return (kv % tp == 0, tp % kv == 0, kv * ratio % tp) == (splits, copies, 0)

    return next(kv for kv in range(1, model.num_kv_heads + 1) if all(same(kv, tp) for tp in tps))


def _window_from(model: ModelConfig) -> int:
    """So that both kinds of layers, with a window and without, are among the first two if the model has both."""
    if model.sliding_window_from >= model.num_layers:
        return model.num_layers
    return 0 if model.full_attention_every else min(1, model.sliding_window_from)


def _head_dim(model: ModelConfig) -> int:
    """The narrowest head, as even or odd as the model's, of which RoPE rotates some pairs and keeps others alike."""

    def same(dim: int) -> bool:
        turned = rotary_dims(replace(model, head_dim=dim))
        all_turn = (turned == dim) == (rotary_dims(model) == model.head_dim)
        least = 4 if model.rope_scaling.type == "ntk" else 2
        return all_turn and (model.position != "rope" or (turned >= least and turned % 2 == 0))

    least = min(HEAD_DIM - model.head_dim % 2, model.head_dim)
    return next(dim for dim in range(least, model.head_dim + 1, 2) if same(dim))


def _rope_scaling(scaling: RopeScaling, seq_len: int, twin: ModelConfig, new_seq_len: int) -> RopeScaling:
    """The scaling, for the twin's heads and samples."""
    pairs, original = rotary_dims(twin) // 2, _scaled(scaling.original_seq_len, seq_len, new_seq_len)
    return replace(
        scaling,
        original_seq_len=max(2, original) if scaling.type == "longrope" else original,
        short_factor=scaling.short_factor[:pairs],
        long_factor=scaling.long_factor[:pairs],
    )


def _scaled(length: int, seq_len: int, new_seq_len: int) -> int:
    """A length within a sequence, for the new sequence; 0 stays 0."""
    return length and max(1, length * new_seq_len // seq_len)


def describe(twins: Sequence[RunConfig], run: RunConfig) -> str:
    """The sizes of a run's twins, and its own where they differ."""

    def sizes(of: RunConfig) -> dict[str, int]:
        m, t = of.model, of.train
        return {
            "layers": m.num_layers,
            "hidden": m.hidden_size,
            "ffn": m.ffn_hidden_size,
            "heads": m.num_heads,
            "kv heads": m.num_kv_heads,
            "head dim": m.head_dim,
            "vocabulary": m.vocab_size,
            "sequence": t.seq_len,
            "microbatch": t.micro_batch_size,
        }

    parts = []
    for name, old in sizes(run).items():
        new = [sizes(twin)[name] for twin in twins]
        between = f"{min(new)}" if min(new) == max(new) else f"{min(new)} to {max(new)}"
        parts.append(f"{name} {between}" + (f" (of {old})" if new != [old] * len(new) else ""))
    return ", ".join(parts)
