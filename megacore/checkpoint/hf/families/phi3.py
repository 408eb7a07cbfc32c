"""Phi-3, Phi-3.5 and Phi-4. Source: transformers' models/phi3, whose fused matrices are in the order of ours."""

from types import MappingProxyType

from megacore.checkpoint.hf.family import Family
from megacore.checkpoint.hf.llama_like import BLOCK, FORMS, llama_keys
from megacore.checkpoint.hf.placement import Same
from megacore.checkpoint.hf.rope import Rope
from megacore.checkpoint.hf.windows import SameWindow

FAMILY = Family(
    ours="phi3",
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    prefix="model.",
    forms=MappingProxyType(
        {
            **FORMS,
            "layers.*.attention.qkv": Same(f"{BLOCK}.self_attn.qkv_proj"),
            "layers.*.mlp.gate_up": Same(f"{BLOCK}.mlp.gate_up_proj"),
        }
    ),
    keys=(
        *llama_keys(longest=4096, eps=1e-5),
        Rope(
            methods=("none", "longrope"),
            share="partial_rotary_factor",
            outside=True,
            renamed=(("su", "longrope"), ("yarn", "longrope")),
        ),
        SameWindow(default=0),
    ),
    usual=MappingProxyType({"attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
)
