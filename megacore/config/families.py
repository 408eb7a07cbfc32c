"""What the name of a model family implies: the feature keys that a run file need not repeat.

Only what differs from the schema's defaults stands here. A key that the user or a preset gives wins.
Sources: the families' published `config.json` files and their model code in the transformers library.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

FAMILIES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # RMSNorm, RoPE, SwiGLU, no biases, untied: the schema's defaults are Llama's.
        "llama": MappingProxyType({}),
        # Mistral's window came and went between releases, so it is a preset's business.
        "mistral": MappingProxyType({}),
        "qwen2": MappingProxyType({"norm_eps": 1e-6, "rope_theta": 1e6, "qkv_bias": True}),
        "qwen3": MappingProxyType({"norm_eps": 1e-6, "rope_theta": 1e6, "qk_norm": True}),
        "gpt2": MappingProxyType(
            {
                "norm": "layernorm",
                "activation": "gelu",
                "position": "learned",
                "tie_embeddings": True,
                "qkv_bias": True,
                "attention_out_bias": True,
                "mlp_bias": True,
            }
        ),
        # Pythia's shape; GPT-NeoX-20B's differs in size only.
        "gpt-neox": MappingProxyType(
            {
                "norm": "layernorm",
                "activation": "gelu-erf",
                "parallel_residual": True,
                "rotary_fraction": 0.25,
                "qkv_bias": True,
                "attention_out_bias": True,
                "mlp_bias": True,
            }
        ),
        "olmo2": MappingProxyType(
            {
                "norm_eps": 1e-6,
                "norm_placement": "post",
                "rope_theta": 5e5,
                "qk_norm": True,
                "qk_norm_over": "all",
            }
        ),
        # Llama's block; windows and long contexts differ from release to release.
        "phi3": MappingProxyType({}),
        "gemma2": MappingProxyType(
            {
                "norm_eps": 1e-6,
                "norm_placement": "both",
                "norm_unit_offset": True,
                "activation": "geglu",
                "tie_embeddings": True,
                "attention_softcap": 50.0,
                "logit_softcap": 30.0,
                "scale_embeddings": True,
                "sliding_window": 4096,
                "full_attention_every": 2,
            }
        ),
    }
)
