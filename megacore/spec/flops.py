"""Model FLOPs: what the maths needs, whatever the engine recomputes (the numerator of MFU)."""

from megacore.spec.model import ModelSpec


def forward_flops_per_token(spec: ModelSpec, seq_len: int, causal: bool = True) -> float:
    """FLOPs of the forward pass per token of a sample of ``seq_len`` tokens.

    A matrix costs 2 per element. Attention costs 2 for the scores and 2 for the values, per query head, head
    dim and visible key; a causal token sees half of the sequence on average, under a sliding window at most the
    window. (Megatron-LM's count today; reference: Narayanan et al. 2021, appendix, less its causal discount.)
    """
    m = spec.config
    visible = float(seq_len)
    if m.sliding_window and m.sliding_window < seq_len:
        visible = float(m.sliding_window)
        if causal:  # the first tokens see fewer than the window
            visible -= m.sliding_window * (m.sliding_window - 1) / (2 * seq_len)
    elif causal:
        visible = seq_len / 2
    return 2 * spec.num_matmul_params + 4 * m.num_layers * m.num_heads * m.head_dim * visible


def train_flops_per_token(spec: ModelSpec, seq_len: int, causal: bool = True) -> float:
    """Forward plus backward (twice the forward): 6N + 6 L a d s, causal."""
    return 3 * forward_flops_per_token(spec, seq_len, causal)
