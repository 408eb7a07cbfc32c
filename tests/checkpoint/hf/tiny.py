"""Tiny HF models of every family, of odd sizes, with random weights: norms and biases, too, so that none is neutral."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

LLAMA = {
    "vocab_size": 1003,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
ONE_KV = {**LLAMA, "num_key_value_heads": 1}
EVEN = {
    "vocab_size": 1003,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}
GPT2 = {"vocab_size": 1003, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_inner": 80, "n_positions": 64}
FACTORS = {"short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.0, 2.5, 4.0, 7.5]}
PHI3 = {**EVEN, "num_key_value_heads": 2, "pad_token_id": None, "sliding_window": 7}


@dataclass(frozen=True)
class Tiny:
    """What makes one model: its class' name without "Config", and the config's keys."""

    kind: str
    keys: dict[str, Any]

    def config(self) -> Any:
        return getattr(transformers, f"{self.kind}Config")(**self.keys)


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **more}}


LLAMA3 = rope("llama3", factor=8.0, original_max_position_embeddings=32, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
LONGROPE = {
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS},
    "original_max_position_embeddings": 16,
    "max_position_embeddings": 64,
}
HALF = {name: numbers[:2] for name, numbers in FACTORS.items()}
MODELS = {
    "llama": Tiny("Llama", LLAMA),
    "llama-tied-bias": Tiny(
        "Llama", {**ONE_KV, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, **LLAMA3}
    ),
    "llama-linear": Tiny("Llama", {**LLAMA, **rope("linear", factor=4.0)}),
    "llama-gelu-yarn": Tiny("Llama", {**ONE_KV, "hidden_act": "gelu_pytorch_tanh", **YARN}),
    "mistral-window": Tiny("Mistral", {**ONE_KV, "sliding_window": 7}),
    "mistral": Tiny("Mistral", {**LLAMA, "sliding_window": None}),
    "qwen2": Tiny("Qwen2", {**LLAMA, "tie_word_embeddings": True}),
    "qwen2-window": Tiny(
        "Qwen2", {**ONE_KV, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, **YARN}
    ),
    "qwen3": Tiny("Qwen3", {**ONE_KV, "attention_bias": True}),
    "gpt2": Tiny("GPT2", GPT2),
    "gpt2-untied": Tiny("GPT2", {**GPT2, "tie_word_embeddings": False, "activation_function": "gelu", "n_inner": None}),
    "gpt-neox": Tiny("GPTNeoX", {**EVEN, "max_position_embeddings": 64, "hidden_size": 96}),
    "gpt-neox-serial": Tiny(
        "GPTNeoX",
        {
            **EVEN,
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rotary_pct": 0.5,
        },
    ),
    "olmo2": Tiny("Olmo2", {**EVEN, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None}),
    "phi3": Tiny("Phi3", PHI3),
    "phi3-longrope": Tiny("Phi3", {**PHI3, **LONGROPE}),
    "phi3-partial": Tiny(
        "Phi3",
        {
            **PHI3,
            **LONGROPE,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **HALF},
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": True,
        },
    ),
    "gemma2": Tiny(
        "Gemma2",
        {
            **LLAMA,
            "pad_token_id": None,  # else HF's embedding gives that token no gradient
            "sliding_window": 7,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma2-uncapped": Tiny(
        "Gemma2",
        {
            **ONE_KV,
            "pad_token_id": None,
            "sliding_window": 9,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
}
"""By name, whose beginning is that of the family."""


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """Make the model, save it to ``folder`` as transformers does, and return it."""
    torch.manual_seed(hash_of(name))
    config = MODELS[name].config()
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(6)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, **more)
    return model


def hash_of(name: str) -> int:
    """A seed of a model's own."""
    return sum(ord(letter) * place for place, letter in enumerate(name, 1))
