"""Mistral 7B and its kin, with and without windows. Source: transformers' models/mistral."""

from types import MappingProxyType

from megacore.checkpoint.hf.family import Family
from megacore.checkpoint.hf.llama_like import FORMS, llama_keys
from megacore.checkpoint.hf.rope import Rope
from megacore.checkpoint.hf.windows import SameWindow

FAMILY = Family(
    ours="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    prefix="model.",
    forms=FORMS,
    keys=(*llama_keys(longest=131072, kv_heads=8), Rope(), SameWindow(default=4096)),
    usual=MappingProxyType({"attention_dropout": 0.0}),
)
