"""The parameters of a decoder by their global names, layer by layer.

Names and shapes of the whole model (h hidden, a query heads, k kv heads, d head_dim, f ffn, V vocabulary):

    embedding.tokens.weight [V, h]            embedding.positions.weight [positions, h]
    layers.N.attention_norm.weight [h]        layers.N.mlp_norm.weight [h]
    layers.N.attention_post_norm.weight [h]   layers.N.mlp_post_norm.weight [h]
    layers.N.attention.qkv.weight [(a+2k)d, h]   rows: query heads, key heads, value heads
    layers.N.attention.q_norm.weight [d]      layers.N.attention.k_norm.weight [d]   (over all heads: [ad] and [kd])
    layers.N.attention.out.weight [h, ad]
    layers.N.mlp.gate_up.weight [2f, h]       rows: gate, up (or layers.N.mlp.up.weight [f, h] where nothing gates)
    layers.N.mlp.down.weight [h, f]
    layers.N.mlp.router.weight [E, h]
    layers.N.mlp.experts.gate_up.weight [E, 2f, h]    layers.N.mlp.experts.down.weight [E, h, f]
    layers.N.mlp.shared.gate_up.weight [2s, h]        layers.N.mlp.shared.down.weight [h, s]
    final_norm.weight [h]                     head.weight [V, h], absent where it is tied

in place of an MLP where E experts of width f (and shared ones of width s together) stand, and of qkv in latent
attention (DeepSeek-V2 2024, section 2.1; q and c wide latents, n dims without and r with position, v of values)

    layers.N.attention.q_down.weight [q, h]   layers.N.attention.q_down_norm.weight [q]
    layers.N.attention.q_up.weight [a(n+r), q]   (or layers.N.attention.q.weight [a(n+r), h])
    layers.N.attention.kv_down.weight [c+r, h]   layers.N.attention.kv_down_norm.weight [c]
    layers.N.attention.kv_up.weight [a(n+v), c]   layers.N.attention.out.weight [h, av]

and a ``.bias`` beside each weight that has one. ``attention_norm`` and ``mlp_norm`` stand before their half of the
block, under norm_placement = "post" after it; under "both" the ones after it are the ``_post_norm``s, which others
lack. Under norm_unit_offset, RMSNorms' weights are what is added to 1.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megacore.config.resolve import GATED
from megacore.config.schema import ModelConfig
from megacore.layout.partition import Segment, Split
from megacore.spec.params import ParamSpec, columns, of_experts, rows


@dataclass(frozen=True)
class LayerSpec:
    """A unit that is never cut by a stage: the embedding, one block, or the head."""

    name: str
    params: tuple[ParamSpec, ...]

    @property
    def num_params(self) -> int:
        """Elements of all its parameters."""
        return sum(param.numel for param in self.params)


@dataclass(frozen=True)
class ModelSpec:
    """The whole model: ``embedding``, ``blocks`` and ``head`` (final norm and output matrix)."""

    config: ModelConfig
    embedding: LayerSpec
    blocks: tuple[LayerSpec, ...]
    head: LayerSpec

    @classmethod
    def of(cls, model: ModelConfig, sequence_parallel: bool = False) -> "ModelSpec":
        """The spec of a resolved model; with ``sequence_parallel``, what works on shards of the sequence has
        gradients that are partial over tp (Korthikanti et al. 2022, section 4.2.2)."""
        make = _Maker(model, ("tp",) if sequence_parallel else ())
        return cls(
            config=model,
            embedding=LayerSpec("embedding", tuple(make.embedding())),
            blocks=tuple(
                LayerSpec(f"layers.{i}", tuple(make.block(f"layers.{i}", is_mixture(model, i))))
                for i in range(model.num_layers)
            ),
            head=LayerSpec("head", tuple(make.head())),
        )

    @property
    def params(self) -> tuple[ParamSpec, ...]:
        """All parameters in global order: embedding, blocks, head."""
        units = (self.embedding, *self.blocks, self.head)
        return tuple(param for unit in units for param in unit.params)

    @property
    def by_name(self) -> dict[str, ParamSpec]:
        """Parameters by global name."""
        return {param.name: param for param in self.params}

    @property
    def num_params(self) -> int:
        """Elements of all parameters; a tied matrix counts once."""
        return sum(param.numel for param in self.params)

    @property
    def num_matmul_params(self) -> int:
        """Elements that every token is multiplied with: the layers' matrices and the output matrix (also if tied)."""
        tied = self.config.vocab_size * self.config.hidden_size if self.config.tie_embeddings else 0
        return sum(map(self.active, filter(_is_matmul, self.params))) + tied

    @property
    def num_active_params(self) -> int:
        """Elements of the parameters that one token meets: of the experts only those that it is sent to."""
        return sum(map(self.active, self.params))

    def active(self, param: ParamSpec) -> int:
        """Elements of ``param`` that one token meets."""
        return param.numel // param.experts * self.config.top_k if param.experts else param.numel


def _is_matmul(param: ParamSpec) -> bool:
    return param.is_matmul


def is_mixture(model: ModelConfig, layer: int) -> bool:
    """Whether a layer, counted from 0, sends its tokens to experts."""
    return bool(model.num_experts) and layer >= model.num_dense_layers and (layer + 1) % model.moe_every == 0


@dataclass(frozen=True)
class _Maker:
    """Writes down the parameters of each unit."""

    model: ModelConfig
    on_sequence: tuple[str, ...]

    @property
    def vocab(self) -> Segment:
        return Segment(self.model.vocab_size)

    def embedding(self) -> Iterator[ParamSpec]:
        m = self.model
        std = m.init_std
        shape = (m.vocab_size, m.hidden_size)
        yield ParamSpec("embedding.tokens.weight", shape, rows(self.vocab), (), std=std, decay=False)
        if m.position == "learned":
            shape = (m.max_positions, m.hidden_size)
            yield ParamSpec("embedding.positions.weight", shape, None, self.on_sequence, std=std, decay=False)

    def block(self, name: str, mixture: bool) -> Iterator[ParamSpec]:
        m = self.model
        both = m.norm_placement == "both"
        yield from self.norm(f"{name}.attention_norm")
        yield from (self.latent_attention if m.kv_lora_rank else self.attention)(f"{name}.attention")
        if both:
            yield from self.norm(f"{name}.attention_post_norm")
        yield from self.norm(f"{name}.mlp_norm")
        if mixture:
            yield from self.mixture(f"{name}.mlp")
        else:
            yield from self.mlp(f"{name}.mlp", m.ffn_hidden_size)
        if both:
            yield from self.norm(f"{name}.mlp_post_norm")

    def attention(self, name: str) -> Iterator[ParamSpec]:
        m = self.model
        heads = Segment(m.num_heads * m.head_dim, m.head_dim)
        kv = Segment(m.num_kv_heads * m.head_dim, m.head_dim, replicate=True)
        yield from self.column(f"{name}.qkv", (heads, kv, kv), m.qkv_bias)
        if m.qk_norm:
            for which, segment in (("q_norm", heads), ("k_norm", kv)):
                yield self.head_norm(f"{name}.{which}.weight", segment)
        yield from self.row(f"{name}.out", heads, m.attention_out_bias)

    def latent_attention(self, name: str) -> Iterator[ParamSpec]:
        """Latents are made on every rank alike; what is made of them are heads."""
        m = self.model
        queries = Segment(m.num_heads * m.head_dim, m.head_dim)
        without = m.qk_nope_head_dim + m.v_head_dim
        if m.q_lora_rank:
            yield from self.latent(f"{name}.q_down", m.q_lora_rank, m.q_lora_rank)
            yield self.weight(f"{name}.q_up.weight", rows(queries), m.q_lora_rank)
        else:
            yield self.weight(f"{name}.q.weight", rows(queries), m.hidden_size)
        yield from self.latent(f"{name}.kv_down", m.kv_lora_rank + m.qk_rope_head_dim, m.kv_lora_rank)
        yield self.weight(f"{name}.kv_up.weight", rows(Segment(m.num_heads * without, without)), m.kv_lora_rank)
        yield from self.row(f"{name}.out", Segment(m.num_heads * m.v_head_dim, m.v_head_dim), m.attention_out_bias)

    def latent(self, name: str, size: int, normed: int) -> Iterator[ParamSpec]:
        """A projection to a latent, and the norm of its first ``normed`` numbers."""
        shape, m = (size, self.model.hidden_size), self.model
        yield ParamSpec(f"{name}.weight", shape, None, self.on_sequence, std=m.init_std, is_matmul=True)
        yield self.vector(f"{name}_norm.weight", normed, self.neutral, self.on_sequence)

    def weight(self, name: str, split: Split, width: int) -> ParamSpec:
        """A matrix of ``width`` inputs whose outputs are split."""
        return ParamSpec(name, (split.size, width), split, std=self.model.init_std, is_matmul=True)

    def mlp(self, name: str, width: int) -> Iterator[ParamSpec]:
        m, ffn = self.model, Segment(width)
        if m.activation in GATED:
            yield from self.column(f"{name}.gate_up", (ffn, ffn), m.mlp_bias)
        else:
            yield from self.column(f"{name}.up", (ffn,), m.mlp_bias)
        yield from self.row(f"{name}.down", ffn, m.mlp_bias)

    def mixture(self, name: str) -> Iterator[ParamSpec]:
        """Router, experts, and those that all tokens go through."""
        m = self.model
        shape = (m.num_experts, m.hidden_size)
        yield ParamSpec(f"{name}.router.weight", shape, None, self.on_sequence, std=m.init_std, is_matmul=True)
        for one in self.mlp(f"{name}.experts", m.moe_ffn_hidden_size):
            split = of_experts(one.split) if one.split else None
            yield replace(one, shape=(m.num_experts, *one.shape), split=split, experts=m.num_experts)
        if m.num_shared_experts:
            yield from self.mlp(f"{name}.shared", m.shared_ffn_hidden_size)

    def head(self) -> Iterator[ParamSpec]:
        m = self.model
        yield from self.norm("final_norm")
        if not m.tie_embeddings:
            shape = (m.vocab_size, m.hidden_size)
            yield ParamSpec("head.weight", shape, rows(self.vocab), std=m.init_std, is_matmul=True)

    @property
    def neutral(self) -> str:
        """What an RMSNorm's weights start as: they multiply by 1."""
        return "zeros" if self.model.norm_unit_offset else "ones"

    def head_norm(self, name: str, heads: Segment) -> ParamSpec:
        """The weight that norms queries or keys."""
        if self.model.qk_norm_over == "all":
            return ParamSpec(name, (heads.size,), rows(heads), init=self.neutral, decay=False)
        # each rank norms its own heads with the same weight, so its gradient is a part of the whole
        return self.vector(name, self.model.head_dim, self.neutral, ("tp",))

    def norm(self, name: str) -> Iterator[ParamSpec]:
        yield self.vector(f"{name}.weight", self.model.hidden_size, self.neutral, self.on_sequence)
        if self.model.norm == "layernorm":
            yield self.vector(f"{name}.bias", self.model.hidden_size, "zeros", self.on_sequence)

    def column(self, name: str, segments: tuple[Segment, ...], bias: bool) -> Iterator[ParamSpec]:
        """A matrix whose outputs are split."""
        split = rows(*segments)
        shape = (split.size, self.model.hidden_size)
        yield ParamSpec(f"{name}.weight", shape, split, std=self.model.init_std, is_matmul=True)
        if bias:
            yield ParamSpec(f"{name}.bias", (split.size,), split, init="zeros", decay=False)

    def row(self, name: str, segment: Segment, bias: bool) -> Iterator[ParamSpec]:
        """A matrix whose inputs are split; it writes into the residual stream."""
        m = self.model
        std = m.init_std / math.sqrt(2 * m.num_layers) if m.init_scale_residual else m.init_std
        yield ParamSpec(f"{name}.weight", (m.hidden_size, segment.size), columns(segment), std=std, is_matmul=True)
        if bias:
            yield self.vector(f"{name}.bias", m.hidden_size, "zeros", self.on_sequence)

    def vector(self, name: str, size: int, init: str, partial: tuple[str, ...]) -> ParamSpec:
        return ParamSpec(name, (size,), None, partial, init=init, decay=False)
