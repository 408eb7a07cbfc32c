"""What a decoder computes, as plainly as it can be said: the yardstick for the engine.

One process, plain tensors keyed by global parameter name, every attention score written out with a full mask,
autograd for the gradients. It shares no code with the engine but the run's `ModelConfig`, so an error common to
all of the engine's layouts still shows. It is checked against `transformers` in test_oracle_against_transformers.py.

Shapes: b batch, s sequence, h hidden, a query heads, k key/value heads, d head_dim, f ffn, V vocabulary.

Choices that the config leaves open, made here:
- "gelu" and the gate of "geglu" are the tanh approximation (GPT-2's gelu_new, Gemma), "gelu-erf" is the exact GELU;
- ALiBi counts distance in tokens of the sequence, whatever `positions` says;
- a sliding window likewise: a token sees itself and the window-1 tokens before it;
- longrope takes the long factors for the samples with a position from the original length on.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from megacore.config.schema import ModelConfig

IGNORED = -100  # a label that is no target


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Global name -> global shape of every parameter of a resolved dense `config`."""
    h, f, d, vocab = config.hidden_size, config.ffn_hidden_size, config.head_dim, config.vocab_size
    a, k = config.num_heads, config.num_kv_heads
    gated = config.activation in ("swiglu", "geglu")
    shapes: dict[str, tuple[int, ...]] = {"embedding.tokens.weight": (vocab, h)}
    if config.position == "learned":
        shapes["embedding.positions.weight"] = (config.max_positions, h)

    def add_norm(name: str) -> None:
        shapes[f"{name}.weight"] = (h,)
        if config.norm == "layernorm":
            shapes[f"{name}.bias"] = (h,)

    def add_linear(name: str, rows: int, columns: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    for layer in range(config.num_layers):
        block = f"layers.{layer}"
        add_norm(f"{block}.attention_norm")
        add_linear(f"{block}.attention.qkv", (a + 2 * k) * d, h, config.qkv_bias)
        if config.qk_norm:
            of_all = config.qk_norm_over == "all"
            shapes[f"{block}.attention.q_norm.weight"] = (a * d if of_all else d,)
            shapes[f"{block}.attention.k_norm.weight"] = (k * d if of_all else d,)
        add_linear(f"{block}.attention.out", h, a * d, config.attention_out_bias)
        add_norm(f"{block}.mlp_norm")
        add_linear(f"{block}.mlp.gate_up" if gated else f"{block}.mlp.up", f * (2 if gated else 1), h, config.mlp_bias)
        add_linear(f"{block}.mlp.down", h, f, config.mlp_bias)
        if config.norm_placement == "both":
            add_norm(f"{block}.attention_post_norm")
            add_norm(f"{block}.mlp_post_norm")
    add_norm("final_norm")
    if not config.tie_embeddings:
        shapes["head.weight"] = (vocab, h)
    return shapes


def random_weights(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Weights for tests: no norm weight is 1 and no bias is 0, so that leaving one out cannot go unseen."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes(config).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        weights[name] = (1 + 0.2 * noise if "norm.weight" in name else 0.2 * noise).to(dtype)
    return weights


def rope_frequencies(config: ModelConfig, is_long: bool = False) -> tuple[Tensor, float]:
    """Radians per token of each rotated pair [d/2] in float64, and the factor on cos and sin.

    linear: Chen et al. 2306.15595; ntk: the static NTK-aware base; yarn: Peng et al. 2309.00071; llama3: the
    piecewise rule of Llama 3.1's release; longrope: Ding et al. 2402.13753, as Phi-3 has it.
    """
    scaling, d, theta = config.rope_scaling, int(config.head_dim * config.rotary_fraction), config.rope_theta
    if scaling.type == "ntk":
        theta = theta * scaling.factor ** (d / (d - 2))
    frequencies = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    if scaling.type in ("none", "ntk"):
        return frequencies, 1.0
    if scaling.type == "longrope":
        each = torch.tensor(scaling.long_factor if is_long else scaling.short_factor, dtype=torch.float64)
        default = math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_seq_len))
        return frequencies / each, scaling.attention_factor or default
    slowed = frequencies / scaling.factor
    if scaling.type == "linear":
        return slowed, 1.0
    turns = scaling.original_seq_len * frequencies / (2 * math.pi)  # full turns over the original length
    if scaling.type == "llama3":
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = kept.clamp(0, 1)
        return kept * frequencies + (1 - kept) * slowed, 1.0
    if scaling.type == "yarn":

        def pair_with_turns(count: float) -> float:
            return d * math.log(scaling.original_seq_len / (count * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair_with_turns(scaling.beta_fast)), 0)
        high = min(math.ceil(pair_with_turns(scaling.beta_slow)), d - 1)
        width = max(high - low, 0.001)
        kept = 1 - ((torch.arange(d // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
        default_factor = 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
        return kept * frequencies + (1 - kept) * slowed, scaling.attention_factor or default_factor
    raise ValueError(f"rope_scaling.type={scaling.type} is not known here")


def alibi_slopes(num_heads: int) -> list[float]:
    """The slopes of Press et al. 2108.12409: 2^(-8/n), 2^(-16/n), ... for n a power of two; else those of the power
    below, then every other slope of the power above."""
    if num_heads & (num_heads - 1) == 0:
        return [2 ** (-8 * (head + 1) / num_heads) for head in range(num_heads)]
    below = 1 << (num_heads.bit_length() - 1)
    return alibi_slopes(below) + alibi_slopes(2 * below)[0::2][: num_heads - below]


def rotate(x_bsnd: Tensor, angles_bsd: Tensor, factor: float) -> Tensor:
    """Turn each pair (x[i], x[i + r/2]) of the first r dims by its angle [.., r/2] (the half-rotation layout of HF
    Llama); the dims behind them stay."""
    pairs = angles_bsd.shape[-1]
    x_bsnd, kept = x_bsnd[..., : 2 * pairs], x_bsnd[..., 2 * pairs :]
    first, second = x_bsnd.chunk(2, dim=-1)
    cos = (angles_bsd.cos() * factor)[:, :, None, :].to(x_bsnd.dtype)
    sin = (angles_bsd.sin() * factor)[:, :, None, :].to(x_bsnd.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, kept), dim=-1)


def softcap(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap) if cap else x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_exact(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


class PlainDecoder:
    """A decoder whose parameters are `weights`, a dict from global name to tensor of global shape.

    Raises ValueError for what it cannot compute (dropout, experts) and for names or shapes that do not fit.
    """

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]):
        if config.dropout or config.attention_dropout or config.num_experts:
            raise ValueError("the plain decoder knows no dropout and no experts; set them to 0")
        given = {name: tuple(weight.shape) for name, weight in weights.items()}
        wanted = weight_shapes(config)
        if given != wanted:
            wrong = sorted(set(given.items()) ^ set(wanted.items()))
            raise ValueError(f"weights do not fit the config: {wrong}")
        self.config = config
        self.weights = weights

    def forward(self, tokens: Tensor, positions: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Logits [b, s, V] of integer `tokens` [b, s].

        `positions` [b, s]: for rope and learned positions; default 0 .. s-1. `documents` [b, s]: a token attends
        only to tokens with its own number; default all one.
        """
        config, w = self.config, self.weights
        b, s = tokens.shape
        if positions is None:
            positions = torch.arange(s).expand(b, s)
        x_bsh = w["embedding.tokens.weight"][tokens]
        if config.scale_embeddings:
            x_bsh = x_bsh * math.sqrt(config.hidden_size)
        if config.position == "learned":
            x_bsh = x_bsh + w["embedding.positions.weight"][positions]
        for layer in range(config.num_layers):
            block, before = f"layers.{layer}", x_bsh
            mask = self._attention_bias(s, documents, layer).to(x_bsh.dtype)
            mixed = self._attention(
                f"{block}.attention", self._norm_before(f"{block}.attention", before), positions, mask
            )
            x_bsh = x_bsh + self._norm_after(f"{block}.attention", mixed)
            fed = before if config.parallel_residual else x_bsh
            inner = self._mlp(f"{block}.mlp", self._norm_before(f"{block}.mlp", fed))
            x_bsh = x_bsh + self._norm_after(f"{block}.mlp", inner)
        head = w["embedding.tokens.weight"] if config.tie_embeddings else w["head.weight"]
        return softcap(self._norm("final_norm", x_bsh) @ head.T, config.logit_softcap)

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Mean over the targets (labels [b, s] that are not -100) of cross-entropy, plus `z_loss` times the mean of
        the squared log-partition. Labels are aligned with tokens: labels[:, i] is what should follow tokens[:, i]."""
        logits = self.forward(tokens, positions, documents).flatten(0, 1)
        target = labels.flatten() != IGNORED
        logits, labels = logits[target], labels.flatten()[target]
        log_partition = logits.logsumexp(-1)
        of_label = log_partition - logits.gather(-1, labels[:, None]).squeeze(-1)
        of_uniform = log_partition - logits.mean(-1)
        cross_entropy = (1 - label_smoothing) * of_label + label_smoothing * of_uniform
        return (cross_entropy + z_loss * log_partition.square()).mean()

    def gradients(
        self,
        tokens: Tensor,
        labels: Tensor,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Global name -> gradient of `loss`, same shapes as the weights (which are left untouched)."""
        leaves = {name: weight.detach().clone().requires_grad_() for name, weight in self.weights.items()}
        loss = PlainDecoder(self.config, leaves).loss(tokens, labels, label_smoothing, z_loss, positions, documents)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def _norm_before(self, half: str, x_bsh: Tensor) -> Tensor:
        return x_bsh if self.config.norm_placement == "post" else self._norm(f"{half}_norm", x_bsh)

    def _norm_after(self, half: str, x_bsh: Tensor) -> Tensor:
        if self.config.norm_placement == "pre":
            return x_bsh
        return self._norm(f"{half}_norm" if self.config.norm_placement == "post" else f"{half}_post_norm", x_bsh)

    def _norm(self, name: str, x_bsh: Tensor) -> Tensor:
        weight, eps = self._norm_weight(name), self.config.norm_eps
        if self.config.norm == "layernorm":
            return layer_norm(x_bsh, weight, self.weights[f"{name}.bias"], eps)
        return rms_norm(x_bsh, weight, eps)

    def _norm_weight(self, name: str) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return 1 + weight if self.config.norm_unit_offset else weight

    def _norm_heads(self, name: str, x_bsnd: Tensor) -> Tensor:
        if self.config.qk_norm_over == "head":
            return rms_norm(x_bsnd, self._norm_weight(name), self.config.norm_eps)
        return rms_norm(x_bsnd.flatten(2), self._norm_weight(name), self.config.norm_eps).view(x_bsnd.shape)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _attention_bias(self, s: int, documents: Tensor | None, layer: int = 0) -> Tensor:
        """What is added to a layer's scores [b or 1, a or 1, s query, s key]: -inf where attention is not allowed."""
        every = self.config.full_attention_every
        sees_all = layer < self.config.sliding_window_from or (every > 0 and layer % every == every - 1)
        query, key = torch.arange(s)[:, None], torch.arange(s)[None, :]
        allowed = (key <= query)[None]
        if self.config.sliding_window and not sees_all:
            allowed = allowed & (query - key < self.config.sliding_window)
        if documents is not None:
            allowed = allowed & (documents[:, :, None] == documents[:, None, :])
        bias = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -math.inf)[:, None]
        if self.config.position == "alibi":
            slopes = torch.tensor(alibi_slopes(self.config.num_heads), dtype=torch.float64)
            bias = bias + slopes[None, :, None, None] * (key - query)
        return bias

    def _attention(self, name: str, x_bsh: Tensor, positions: Tensor, bias: Tensor) -> Tensor:
        config = self.config
        a, k, d = config.num_heads, config.num_kv_heads, config.head_dim
        heads = self._linear(f"{name}.qkv", x_bsh).unflatten(-1, (a + 2 * k, d))
        q_bsad, k_bskd, v_bskd = heads.split((a, k, k), dim=2)
        if config.qk_norm:
            q_bsad, k_bskd = self._norm_heads(f"{name}.q_norm", q_bsad), self._norm_heads(f"{name}.k_norm", k_bskd)
        if config.position == "rope":
            is_long = [row.max().item() >= config.rope_scaling.original_seq_len for row in positions]
            of_sample = [rope_frequencies(config, long) for long in is_long]
            factor = of_sample[0][1]
            angles = torch.stack([row[:, None] * turns for row, (turns, _) in zip(positions, of_sample, strict=True)])
            q_bsad, k_bskd = rotate(q_bsad, angles, factor), rotate(k_bskd, angles, factor)
        k_bsad = k_bskd.repeat_interleave(a // k, dim=2)
        v_bsad = v_bskd.repeat_interleave(a // k, dim=2)
        scores = torch.einsum("bqad,bkad->baqk", q_bsad, k_bsad) / math.sqrt(config.attention_scale_dim or d)
        scores = softcap(scores, config.attention_softcap) + bias
        mixed_bsad = torch.einsum("baqk,bkad->bqad", scores.softmax(-1), v_bsad)
        return self._linear(f"{name}.out", mixed_bsad.flatten(2))

    def _mlp(self, name: str, x_bsh: Tensor) -> Tensor:
        activation = self.config.activation
        if activation in ("swiglu", "geglu"):
            gate, up = self._linear(f"{name}.gate_up", x_bsh).chunk(2, dim=-1)
            inner = (functional.silu(gate) if activation == "swiglu" else gelu_tanh(gate)) * up
        else:
            up = self._linear(f"{name}.up", x_bsh)
            shapes = {"gelu": gelu_tanh, "gelu-erf": gelu_exact, "relu2": lambda x: x.relu().square()}
            inner = shapes[activation](up)
        return self._linear(f"{name}.down", inner)
