"""A Llama in idiomatic PyTorch and its training step: SDPA, F.rms_norm, F.cross_entropy, AdamW.

Query, key and value (and gate and up) are matrices of their own, as in torchtitan and transformers: DTensor's
tensor parallelism needs them apart.
Shapes: b batch, s sequence, h hidden, d head_dim, V vocabulary.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from megacore.config.schema import ModelConfig, OptimConfig
from megacore.config.settings import settings

Step = Callable[[Tensor, Tensor], Tensor]  # (tokens [b, s], labels [b, s]) -> loss, weights updated


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        h, d = config.hidden_size, config.head_dim
        self.head_dim = d
        self.grouped = config.num_kv_heads != config.num_heads
        self.wq = nn.Linear(h, config.num_heads * d, bias=False)
        self.wk = nn.Linear(h, config.num_kv_heads * d, bias=False)
        self.wv = nn.Linear(h, config.num_kv_heads * d, bias=False)
        self.wo = nn.Linear(config.num_heads * d, h, bias=False)

    def forward(self, x_bsh: Tensor, cos_sd: Tensor, sin_sd: Tensor) -> Tensor:
        b, s, _ = x_bsh.shape
        # the number of heads follows from the matrix, which tensor parallelism may have cut
        q = self.wq(x_bsh).view(b, s, -1, self.head_dim).transpose(1, 2)
        k = self.wk(x_bsh).view(b, s, -1, self.head_dim).transpose(1, 2)
        v = self.wv(x_bsh).view(b, s, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos_sd, sin_sd), rotate(k, cos_sd, sin_sd)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.wo(mixed.transpose(1, 2).reshape(b, s, -1))


def rotate(x_bnsd: Tensor, cos_sd: Tensor, sin_sd: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + d/2]), HF's layout."""
    first, second = x_bnsd.chunk(2, dim=-1)
    return x_bnsd * cos_sd + torch.cat((-second, first), dim=-1) * sin_sd


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.w2 = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x_bsh: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x_bsh)) * self.w3(x_bsh))


class Block(nn.Module):
    """Pre-norm: attention, then the feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x_bsh: Tensor, cos_sd: Tensor, sin_sd: Tensor) -> Tensor:
        x_bsh = x_bsh + self.attention(self.attention_norm(x_bsh), cos_sd, sin_sd)
        return x_bsh + self.feed_forward(self.ffn_norm(x_bsh))


class PlainLlama(nn.Module):
    """Llama of the shape of `config` (its rope, rmsnorm, swiglu and no biases are taken for granted)."""

    cos_sd: Tensor
    sin_sd: Tensor

    def __init__(self, config: ModelConfig, seq_len: int):
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles_sd = torch.outer(torch.arange(seq_len), frequencies).repeat(1, 2)
        self.register_buffer("cos_sd", angles_sd.cos(), persistent=False)
        self.register_buffer("sin_sd", angles_sd.sin(), persistent=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=config.init_std)

    def forward(self, tokens_bs: Tensor) -> Tensor:
        x_bsh = self.tok_embeddings(tokens_bs)
        for layer in self.layers:
            x_bsh = layer(x_bsh, self.cos_sd, self.sin_sd)
        return self.output(self.norm(x_bsh))


def decayed_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay, vectors do not: the usual two groups."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.dim() >= 2 else vectors).append(parameter)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def adamw(parameters: Iterable[nn.Parameter], config: OptimConfig, **how: bool) -> torch.optim.AdamW:
    """torch's AdamW; `how` chooses its implementation (fused=True or foreach=True)."""
    own = settings(config)
    groups = decayed_groups(parameters, own["weight_decay"])
    return torch.optim.AdamW(groups, lr=config.lr, betas=(own["beta1"], own["beta2"]), eps=own["eps"], **how)


def training_step(model: nn.Module, optim: OptimConfig, **how: bool) -> Step:
    """Forward, backward, clip, update: the whole of a small trainer's loop body."""
    optimizer = adamw(model.parameters(), optim, **(how or {"fused": True}))
    parameters = list(model.parameters())

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        loss = functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        loss.backward()
        if optim.clip_grad:
            torch.nn.utils.clip_grad_norm_(parameters, optim.clip_grad, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
