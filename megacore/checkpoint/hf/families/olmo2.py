"""OLMo-2. Source: transformers' models/olmo2: norms after attention and MLP, and of all heads at once."""

from types import MappingProxyType

from megacore.checkpoint.hf.family import Family
from megacore.checkpoint.hf.keys import Flag
from megacore.checkpoint.hf.llama_like import ATTENTION, BLOCK, MLP, OUTSIDE, llama_keys
from megacore.checkpoint.hf.placement import Same
from megacore.checkpoint.hf.rope import Rope
from megacore.checkpoint.hf.windows import NoWindow

FAMILY = Family(
    ours="olmo2",
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    prefix="model.",
    forms=MappingProxyType(
        {
            **OUTSIDE,
            **ATTENTION,
            "layers.*.attention_norm": Same(f"{BLOCK}.post_attention_layernorm"),
            **MLP,
            "layers.*.mlp_norm": Same(f"{BLOCK}.post_feedforward_layernorm"),
        }
    ),
    keys=(
        *llama_keys(longest=2048, eps=1e-5),
        Flag("attention_bias", ("qkv_bias", "attention_out_bias"), False),
        Rope(),
        NoWindow(),
    ),
    usual=MappingProxyType({"attention_dropout": 0.0}),
)
