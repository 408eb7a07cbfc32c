"""Gemma-2. Source: transformers' models/gemma2: norms before and after, soft caps, windows by turns."""

from types import MappingProxyType

from megacore.checkpoint.hf.family import Family
from megacore.checkpoint.hf.keys import Flag, Number, Only, Word
from megacore.checkpoint.hf.llama_like import ATTENTION, BLOCK, MLP, OUTSIDE
from megacore.checkpoint.hf.placement import Same
from megacore.checkpoint.hf.rope import Rope
from megacore.checkpoint.hf.windows import TurnsOfWindows

ACTIVATIONS = MappingProxyType(
    {"gelu_pytorch_tanh": "geglu", "gelu_new": "geglu", "gelu_fast": "geglu", "silu": "swiglu"}
)

FAMILY = Family(
    ours="gemma2",
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    prefix="model.",
    forms=MappingProxyType(
        {
            **OUTSIDE,
            "layers.*.attention_norm": Same(f"{BLOCK}.input_layernorm"),
            **ATTENTION,
            "layers.*.attention_post_norm": Same(f"{BLOCK}.post_attention_layernorm"),
            "layers.*.mlp_norm": Same(f"{BLOCK}.pre_feedforward_layernorm"),
            **MLP,
            "layers.*.mlp_post_norm": Same(f"{BLOCK}.post_feedforward_layernorm"),
        }
    ),
    keys=(
        Number("vocab_size", "vocab_size"),
        Number("hidden_size", "hidden_size"),
        Number("intermediate_size", "ffn_hidden_size"),
        Number("num_hidden_layers", "num_layers"),
        Number("num_attention_heads", "num_heads"),
        Number("num_key_value_heads", "num_kv_heads", 4, null=0),
        Number("head_dim", "head_dim", 256, null=0),
        Number("max_position_embeddings", "max_positions", 8192),
        Number("rms_norm_eps", "norm_eps", 1e-6, whole=False),
        Word("hidden_activation", "activation", ACTIVATIONS, "gelu_pytorch_tanh", also=("hidden_act",)),
        Number("query_pre_attn_scalar", "attention_scale_dim", 256),
        Number("attn_logit_softcapping", "attention_softcap", 50.0, null=0.0, whole=False, or_null=True),
        Number("final_logit_softcapping", "logit_softcap", 30.0, null=0.0, whole=False, or_null=True),
        Flag("attention_bias", ("qkv_bias", "attention_out_bias"), False),
        Flag("tie_word_embeddings", ("tie_embeddings",), True),
        Only("use_bidirectional_attention", (False,)),
        Rope(),
        TurnsOfWindows(default=4096),
    ),
    usual=MappingProxyType({"attention_dropout": 0.0}),
)
