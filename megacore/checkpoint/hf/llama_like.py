"""What the families that came after Llama share: names of tensors, and keys of config.json."""

from collections.abc import Mapping
from types import MappingProxyType

from megacore.checkpoint.hf.keys import Flag, Key, Number, Word
from megacore.checkpoint.hf.placement import Form, Same, Segments

BLOCK = "model.layers.*"

OUTSIDE: Mapping[str, Form] = MappingProxyType(
    {
        "embedding.tokens": Same("model.embed_tokens"),
        "final_norm": Same("model.norm"),
        "head": Same("lm_head"),
    }
)
ATTENTION: Mapping[str, Form] = MappingProxyType(
    {
        "layers.*.attention.qkv": Segments(
            (f"{BLOCK}.self_attn.q_proj", f"{BLOCK}.self_attn.k_proj", f"{BLOCK}.self_attn.v_proj")
        ),
        "layers.*.attention.q_norm": Same(f"{BLOCK}.self_attn.q_norm"),
        "layers.*.attention.k_norm": Same(f"{BLOCK}.self_attn.k_norm"),
        "layers.*.attention.out": Same(f"{BLOCK}.self_attn.o_proj"),
    }
)
MLP: Mapping[str, Form] = MappingProxyType(
    {
        "layers.*.mlp.gate_up": Segments((f"{BLOCK}.mlp.gate_proj", f"{BLOCK}.mlp.up_proj")),
        "layers.*.mlp.down": Same(f"{BLOCK}.mlp.down_proj"),
    }
)
FORMS: Mapping[str, Form] = MappingProxyType(
    {
        **OUTSIDE,
        "layers.*.attention_norm": Same(f"{BLOCK}.input_layernorm"),
        **ATTENTION,
        "layers.*.mlp_norm": Same(f"{BLOCK}.post_attention_layernorm"),
        **MLP,
    }
)
GATES = MappingProxyType({"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"})
"""Activations in an MLP with a gate."""


def llama_keys(longest: int, kv_heads: int = 0, head_dim: int = 0, eps: float = 1e-6) -> tuple[Key, ...]:
    """Sizes, norm, activation and tying; with the defaults that transformers has where a key is absent (0: it follows
    from others)."""
    return (
        Number("vocab_size", "vocab_size"),
        Number("hidden_size", "hidden_size"),
        Number("intermediate_size", "ffn_hidden_size"),
        Number("num_hidden_layers", "num_layers"),
        Number("num_attention_heads", "num_heads"),
        Number("num_key_value_heads", "num_kv_heads", kv_heads, null=0),
        Number("head_dim", "head_dim", head_dim, null=0),
        Number("max_position_embeddings", "max_positions", longest),
        Number("rms_norm_eps", "norm_eps", eps, whole=False),
        Word("hidden_act", "activation", GATES, "silu"),
        Flag("tie_word_embeddings", ("tie_embeddings",), False),
    )
