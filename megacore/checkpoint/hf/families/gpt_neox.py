"""GPT-NeoX and Pythia. Source: transformers' models/gpt_neox, whose fused matrix goes head by head."""

from types import MappingProxyType

from megacore.checkpoint.hf.family import Family
from megacore.checkpoint.hf.keys import Flag, Number, Word
from megacore.checkpoint.hf.placement import ByHead, Same
from megacore.checkpoint.hf.rope import Rope
from megacore.checkpoint.hf.windows import NoWindow

BLOCK = "gpt_neox.layers.*"
ACTIVATIONS = MappingProxyType(
    {"gelu": "gelu-erf", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_pytorch_tanh": "gelu", "relu2": "relu2"}
)

FAMILY = Family(
    ours="gpt-neox",
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    forms=MappingProxyType(
        {
            "embedding.tokens": Same("gpt_neox.embed_in"),
            "layers.*.attention_norm": Same(f"{BLOCK}.input_layernorm"),
            "layers.*.attention.qkv": ByHead(f"{BLOCK}.attention.query_key_value"),
            "layers.*.attention.out": Same(f"{BLOCK}.attention.dense"),
            "layers.*.mlp_norm": Same(f"{BLOCK}.post_attention_layernorm"),
            "layers.*.mlp.up": Same(f"{BLOCK}.mlp.dense_h_to_4h"),
            "layers.*.mlp.down": Same(f"{BLOCK}.mlp.dense_4h_to_h"),
            "final_norm": Same("gpt_neox.final_layer_norm"),
            "head": Same("embed_out"),
        }
    ),
    keys=(
        Number("vocab_size", "vocab_size"),
        Number("hidden_size", "hidden_size"),
        Number("intermediate_size", "ffn_hidden_size"),
        Number("num_hidden_layers", "num_layers"),
        Number("num_attention_heads", "num_heads"),
        Number("max_position_embeddings", "max_positions", 2048),
        Number("layer_norm_eps", "norm_eps", 1e-5, whole=False),
        Word("hidden_act", "activation", ACTIVATIONS, "gelu"),
        Flag("use_parallel_residual", ("parallel_residual",), True),
        Flag("attention_bias", ("qkv_bias", "attention_out_bias"), True),
        Flag("tie_word_embeddings", ("tie_embeddings",), False),
        Rope(base="rotary_emb_base", share="rotary_pct", usual_share=0.25),
        NoWindow(),
    ),
    leftovers=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    usual=MappingProxyType({"attention_dropout": 0.0, "hidden_dropout": 0.0}),
)
