"""Qwen2 and Qwen2.5. Source: transformers' models/qwen2, whose query, key and value always have biases."""

from types import MappingProxyType

from megacore.checkpoint.hf.family import Family
from megacore.checkpoint.hf.llama_like import FORMS, llama_keys
from megacore.checkpoint.hf.rope import Rope
from megacore.checkpoint.hf.windows import UpperWindows

FAMILY = Family(
    ours="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    prefix="model.",
    forms=FORMS,
    keys=(*llama_keys(longest=32768, kv_heads=32), Rope(), UpperWindows()),
    usual=MappingProxyType({"attention_dropout": 0.0}),
)
