"""GPT-2. Source: transformers' models/gpt2, whose matrices are Conv1D's: [in, out]."""

from types import MappingProxyType

from megacore.checkpoint.hf.family import Family
from megacore.checkpoint.hf.keys import Flag, Number, Only, Word
from megacore.checkpoint.hf.placement import Same, Transposed
from megacore.checkpoint.hf.windows import NoWindow

BLOCK = "transformer.h.*"
ACTIVATIONS = MappingProxyType(
    {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu-erf", "relu2": "relu2"}
)

FAMILY = Family(
    ours="gpt2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    forms=MappingProxyType(
        {
            "embedding.tokens": Same("transformer.wte"),
            "embedding.positions": Same("transformer.wpe"),
            "layers.*.attention_norm": Same(f"{BLOCK}.ln_1"),
            "layers.*.attention.qkv": Transposed(f"{BLOCK}.attn.c_attn"),
            "layers.*.attention.out": Transposed(f"{BLOCK}.attn.c_proj"),
            "layers.*.mlp_norm": Same(f"{BLOCK}.ln_2"),
            "layers.*.mlp.up": Transposed(f"{BLOCK}.mlp.c_fc"),
            "layers.*.mlp.down": Transposed(f"{BLOCK}.mlp.c_proj"),
            "final_norm": Same("transformer.ln_f"),
            "head": Same("lm_head"),
        }
    ),
    keys=(
        Number("vocab_size", "vocab_size"),
        Number("n_embd", "hidden_size"),
        Number("n_inner", "ffn_hidden_size", 0),
        Number("n_layer", "num_layers"),
        Number("n_head", "num_heads"),
        Number("n_positions", "max_positions", 1024),
        Number("layer_norm_epsilon", "norm_eps", 1e-5, whole=False),
        Word("activation_function", "activation", ACTIVATIONS, "gelu_new"),
        Flag("tie_word_embeddings", ("tie_embeddings",), True),
        Only("scale_attn_weights", (True,)),
        Only("scale_attn_by_inverse_layer_idx", (False,)),
        Only("add_cross_attention", (False,)),
        NoWindow(),
    ),
    leftovers=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
)
