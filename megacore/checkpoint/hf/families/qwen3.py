"""Qwen3, without its mixtures of experts. Source: transformers' models/qwen3."""

from types import MappingProxyType

from megacore.checkpoint.hf.family import Family
from megacore.checkpoint.hf.keys import Flag
from megacore.checkpoint.hf.llama_like import FORMS, llama_keys
from megacore.checkpoint.hf.rope import Rope
from megacore.checkpoint.hf.windows import UpperWindows

FAMILY = Family(
    ours="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    prefix="model.",
    forms=FORMS,
    keys=(
        *llama_keys(longest=32768, kv_heads=32, head_dim=128),
        Flag("attention_bias", ("qkv_bias", "attention_out_bias"), False),
        Rope(),
        UpperWindows(),
    ),
    usual=MappingProxyType({"attention_dropout": 0.0}),
)
