"""Llama 2 and 3.x. Sources: the released config.json files; transformers' models/llama."""

from types import MappingProxyType

from megacore.checkpoint.hf.family import Family
from megacore.checkpoint.hf.keys import Flag
from megacore.checkpoint.hf.llama_like import FORMS, llama_keys
from megacore.checkpoint.hf.rope import Rope
from megacore.checkpoint.hf.windows import NoWindow

FAMILY = Family(
    ours="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    forms=FORMS,
    keys=(
        *llama_keys(longest=2048),
        Flag("attention_bias", ("qkv_bias", "attention_out_bias"), False),
        Flag("mlp_bias", ("mlp_bias",), False),
        Rope(),
        NoWindow(),
    ),
    leftovers=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    usual=MappingProxyType({"attention_dropout": 0.0, "pretraining_tp": 1}),
)
