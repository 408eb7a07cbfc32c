"""`transformers`' Llama, eager with SDPA, in the same training step as the plain model."""

import torch
from torch import Tensor, nn

from megacore.bench.baselines.plain_llama import Step, training_step
from megacore.config.schema import ModelConfig, OptimConfig


class LogitsOnly(nn.Module):
    """The HF model seen as tokens -> logits; the cache of generation is off."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens_bs: Tensor) -> Tensor:
        return self.model(tokens_bs, use_cache=False).logits


def hf_llama(config: ModelConfig, seq_len: int) -> nn.Module:
    """An untrained LlamaForCausalLM of the shape of `config`. Raises ImportError without transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hf_config = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
        dtype=torch.float32,
    )
    hf_config._attn_implementation = "sdpa"
    return LogitsOnly(LlamaForCausalLM(hf_config)).train()


def hf_step(config: ModelConfig, optim: OptimConfig, seq_len: int) -> Step:
    """The plain model's training step, on the HF model."""
    return training_step(hf_llama(config, seq_len), optim)
