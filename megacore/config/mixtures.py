"""What mixtures of experts and latent attention ask of a run. (The engine refuses both: see ``supported.py``.)"""

from collections.abc import Iterator

from megacore.config.resolve import resolve_model
from megacore.config.schema import ModelConfig, RunConfig

OF_EXPERTS = ("moe_ffn_hidden_size", "num_shared_experts", "shared_ffn_hidden_size", "num_dense_layers")
OF_LATENTS = ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def mixture_problems(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """Lines about experts: their number against the layout, and keys that would have no effect."""
    m, p = config.model, config.parallel
    if not m.num_experts:
        idle = [f"model.{name}={getattr(m, name)}" for name in OF_EXPERTS if getattr(m, name)]
        idle += [f"model.moe_every={m.moe_every}"] * (m.moe_every != 1) + [f"parallel.ep={p.ep}"] * (p.ep > 1)
        for what in idle:
            yield f"{what} is for a mixture of experts, but model.num_experts=0; give it, or leave both out"
        return
    if not m.top_k:
        yield f"model.top_k=0 sends tokens to none of model.num_experts={m.num_experts}; 1, 2 and 8 are usual"
    if m.num_dense_layers + m.moe_every > m.num_layers:
        yield (
            f"model.num_dense_layers={m.num_dense_layers} and moe_every={m.moe_every} leave no MoE layer among "
            f"model.num_layers={m.num_layers}; use smaller ones, or num_experts=0"
        )
    if m.shared_ffn_hidden_size and not m.num_shared_experts:
        yield (
            f"model.shared_ffn_hidden_size={m.shared_ffn_hidden_size} needs model.num_shared_experts, which is 0; "
            "give it, or leave both out"
        )
    if m.num_experts % p.ep:
        legal = [n for n in range(1, m.num_experts + 1) if m.num_experts % n == 0]
        yield f"parallel.ep={p.ep} does not divide model.num_experts={m.num_experts}; use {_near(legal, p.ep)}"
    etp = p.etp or (p.tp if p.ep == 1 else 1)
    if m.head_dim or m.kv_lora_rank or not m.hidden_size % m.num_heads:
        width = resolve_model(m, config.train.seq_len).moe_ffn_hidden_size
        if width % etp:
            yield f"parallel.etp={etp} does not divide model.moe_ffn_hidden_size={width}; use a divisor"
    model_ranks = p.tp * p.pp * p.cp
    if world_size is not None and world_size % model_ranks == 0 and world_size // p.pp % (p.ep * etp):
        yield (
            f"parallel.ep*etp={p.ep}*{etp}={p.ep * etp} does not divide dp*cp*tp={world_size // p.pp}; "
            "experts live on the ranks of one pipeline stage"
        )


def latent_problems(m: ModelConfig) -> Iterator[str]:
    """Lines about latent attention."""
    if not m.kv_lora_rank:
        for name in OF_LATENTS:
            if getattr(m, name):
                yield (
                    f"model.{name}={getattr(m, name)} is for latent attention, but model.kv_lora_rank=0; give it "
                    "(DeepSeek-V3 has 512), or leave both out"
                )
        return
    head = (m.qk_nope_head_dim or 128) + (m.qk_rope_head_dim or 64)
    if m.head_dim not in (0, head):
        yield f"model.head_dim={m.head_dim} is not qk_nope_head_dim + qk_rope_head_dim={head}; leave it out"
    if m.num_kv_heads not in (0, m.num_heads):
        yield (
            f"model.num_kv_heads={m.num_kv_heads} does not go with latent attention (model.kv_lora_rank="
            f"{m.kv_lora_rank}), which makes keys and values for each of model.num_heads={m.num_heads}; leave it out"
        )
    if m.position != "rope" or m.qk_norm or m.qkv_bias:
        yield (
            f"model.kv_lora_rank={m.kv_lora_rank} is for model.position=rope, without qk_norm and qkv_bias, not "
            f"position={m.position}, qk_norm={str(m.qk_norm).lower()}, qkv_bias={str(m.qkv_bias).lower()}; change these"
        )


def _near(legal: list[int], size: int) -> str:
    below, above = [n for n in legal if n < size][-1:], [n for n in legal if n > size][:1]
    return " or ".join(map(str, below + above))
