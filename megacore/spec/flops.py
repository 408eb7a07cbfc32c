"""Model FLOPs: what the maths needs, whatever the engine recomputes (the numerator of MFU)."""

from typing import NamedTuple

from megacore.config.resolve import window_of
from megacore.spec.model import ModelSpec


class UnitFlops(NamedTuple):
    """FLOPs of the forward pass per token of each kind of unit; of blocks that differ (some see but a window), the
    mean."""

    embedding: float
    block: float
    head: float


def forward_flops_per_token(spec: ModelSpec, seq_len: int, causal: bool = True) -> float:
    """FLOPs of the forward pass per token of a sample of ``seq_len`` tokens.

    A matrix costs 2 per element (of experts those that a token is sent to). Attention costs 2 for the scores and 2
    for the values, per query head, head dim and visible key; a causal token sees half of the sequence on average, under
    a sliding window at most the window. (Megatron-LM's count today; reference: Narayanan et al. 2021, appendix, less
    its causal discount.)
    """
    m = spec.config
    attention = sum(_attention_flops(spec, seq_len, causal, layer) for layer in range(m.num_layers))
    return 2 * spec.num_matmul_params + attention


def train_flops_per_token(spec: ModelSpec, seq_len: int, causal: bool = True) -> float:
    """Forward plus backward (twice the forward): 6N + 6 L a d s, causal."""
    return 3 * forward_flops_per_token(spec, seq_len, causal)


def unit_flops_per_token(spec: ModelSpec, seq_len: int, causal: bool = True) -> UnitFlops:
    """`forward_flops_per_token` unit by unit; for cutting the model into stages.

    The embedding's look-up, which model FLOPs leave out, counts one per element that it copies or adds.
    """
    m = spec.config
    blocks = [block_flops_per_token(spec, seq_len, layer, causal) for layer in range(m.num_layers)]
    return UnitFlops(
        embedding=len(spec.embedding.params) * m.hidden_size,
        block=sum(blocks) / len(blocks),
        head=2 * m.vocab_size * m.hidden_size,
    )


def block_flops_per_token(spec: ModelSpec, seq_len: int, layer: int, causal: bool = True) -> float:
    """`forward_flops_per_token` of one block."""
    matrices = sum(spec.active(param) for param in spec.blocks[layer].params if param.is_matmul)
    return 2 * matrices + _attention_flops(spec, seq_len, causal, layer)


def _attention_flops(spec: ModelSpec, seq_len: int, causal: bool, layer: int) -> float:
    """Scores and values of one block, per token."""
    m, window = spec.config, window_of(spec.config, layer)
    visible = float(seq_len)
    if 0 < window < seq_len:
        visible = float(window)
        if causal:  # the first tokens see fewer than the window
            visible -= window * (window - 1) / (2 * seq_len)
    elif causal:
        visible = seq_len / 2
    of_values = m.v_head_dim if m.kv_lora_rank else m.head_dim
    return 2 * m.num_heads * (m.head_dim + of_values) * visible
