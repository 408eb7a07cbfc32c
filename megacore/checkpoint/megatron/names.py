"""The names of tensors: Megatron-Core's, which are meant everywhere else, those of older versions, and ours."""

import re
from collections.abc import Mapping
from types import MappingProxyType

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
FC1 = "mlp.linear_fc1"

OURS: Mapping[str, str] = MappingProxyType(
    {
        "embedding.tokens": "embedding.word_embeddings",
        "embedding.positions": "embedding.position_embeddings",
        "attention_norm": "input_layernorm",
        "attention.qkv": "self_attention.linear_qkv",
        "attention.q_norm": "self_attention.q_layernorm",
        "attention.k_norm": "self_attention.k_layernorm",
        "attention.out": "self_attention.linear_proj",
        "mlp_norm": "pre_mlp_layernorm",
        "mlp.gate_up": FC1,
        "mlp.up": FC1,
        "mlp.down": "mlp.linear_fc2",
        "final_norm": "decoder.final_layernorm",
        "head": "output_layer",
    }
)
"""Modules of ours -> theirs; in a layer, without what stands before both."""

ALIASES = (
    # Megatron-LM before Megatron-Core; the encoder was once called transformer
    (r"^language_model\.", ""),
    (r"^(encoder|transformer)\.(layers\.|final_)", r"decoder.\2"),
    (r"^decoder\.final_norm\.", "decoder.final_layernorm."),
    (r"\.(self_)?attention\.query_key_value\.", ".self_attention.linear_qkv."),
    (r"\.(self_)?attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.(self_)?attention\.([qk])_(layer)?norm\.", r".self_attention.\2_layernorm."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"\.post_attention_(layer)?norm\.", ".pre_mlp_layernorm."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
    (r"^word_embeddings_for_head\.", "output_layer."),
    # norms that are fused with the matrix behind them
    (r"\.self_attention\.linear_qkv\.layer_norm_", ".input_layernorm."),
    (r"\.mlp\.linear_fc1\.layer_norm_", ".pre_mlp_layernorm."),
)
COMPILED = tuple((re.compile(pattern), new) for pattern, new in ALIASES)

LEFT_OUT = re.compile(r"_extra_state(/|$)|(^|\.)inv_freq$|^(chained_\d+\.)?optimizer\.|^rng_state|^rerun_state")
"""What is there and is not a weight: scales of FP8, tables that follow from the settings, other state."""

FOREIGN = (
    (r"\.experts\.|\.router\.", "mixtures of experts"),
    (r"linear_(q|kv)_(down|up)_proj", "multi-latent attention"),
    (r"^encoder\.|^lm_head\.|^binary_head\.|^pooler\.|cross_attention", "BERT and T5"),
    (r"^mtp\.", "multi-token prediction"),
    (r"\.mixer\.", "Mamba and hybrid models"),
    (r"^model\.module\.|^module\.", "the formats fsdp_dtensor and torch_dcp"),
    (r"^vision|^image", "vision models"),
    (r"softmax_offset", "learned softmax offsets"),
    (r"adapter|lora", "adapters; merge them into the weights first"),
)
"""What a tensor that has no place in our models tells of."""


def canonical(name: str) -> str:
    """Megatron-Core's name, as of a model without fused norms, of a tensor of any version."""
    for pattern, new in COMPILED:
        name = pattern.sub(new, name)
    return name


def theirs(name: str) -> str:
    """Megatron-Core's name of a parameter of ours."""
    module, _, ending = name.rpartition(".")
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
    if layer is None:
        return f"{OURS[module]}.{ending}"
    return f"decoder.layers.{layer[1]}.{OURS[layer[2]]}.{ending}"


def reason(name: str) -> str:
    """Why a tensor is not expected, as far as its name tells."""
    for pattern, what in FOREIGN:
        if re.search(pattern, name):
            return f"; {what} are not supported"
    return ""
