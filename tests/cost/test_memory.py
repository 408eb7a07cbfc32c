"""Memory by rank: state against the engine's own arithmetic, activations against published formulas and counts."""

from dataclasses import replace

import pytest

from megacore.config.load import load
from megacore.config.resolve import resolve, resolve_model
from megacore.config.schema import ModelConfig, RunConfig
from megacore.cost.memory import RankMemory, memory_by_rank
from megacore.cost.practice import Practice
from megacore.cost.waiting import Way, waiting
from megacore.layout import Layout
from megacore.spec import ModelSpec
from megacore.spec.memory import state_bytes
from megacore.spec.stages import layers_of_stages, params_of_stages

SHAPE = ("model.num_layers=6", "model.hidden_size=64", "model.num_heads=4", "model.vocab_size=1000")
BATCH = ("train.seq_len=128", "train.global_batch_size=32", "precision.dtype=bf16")
MIXED = ("model.num_experts=8", "model.top_k=2", "model.moe_ffn_hidden_size=96", "model.num_dense_layers=1")


def run(world: int, *overrides: str, practice: Practice | None = None) -> tuple[RunConfig, tuple[RankMemory, ...]]:
    config = resolve(load(None, [*SHAPE, *BATCH, *overrides]), world)
    return config, memory_by_rank(config, Layout.of(config.parallel, world), practice or Practice())


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, ()),
        (4, ("parallel.tp=2", "parallel.zero=1", "optim.name=adafactor")),
        (8, ("parallel.pp=2", "parallel.zero=2", "model.tie_embeddings=true")),
        (8, ("parallel.pp=4", "parallel.zero=3", "parallel.stage_layers=[1,2,3,0]")),
        (4, ("parallel.pp=2", "parallel.chunks=2", "optim.freeze=['layers.0.*']", "optim.offload=cpu")),
    ],
)
def test_state_is_the_engines_own(world: int, overrides: tuple[str, ...]) -> None:
    config, ranks = run(world, *overrides)
    p, spec = config.parallel, ModelSpec.of(config.model)
    stages = layers_of_stages(config.model, 128, p.pp * p.chunks, p.stage_layers)
    for rank, said in enumerate(ranks):
        held = params_of_stages(spec, stages, range(rank, len(stages), p.pp))
        bytes_ = state_bytes(held, config.optim, "bf16", 0, p.tp, p.zero, p.dp_shard, device="cuda")
        assert (said.params, said.grads, said.optimizer) == (bytes_.params, bytes_.grads, bytes_.optimizer)
        assert said.host == bytes_.host


def test_experts_are_dealt_out_over_ep_and_sharded_over_the_rest() -> None:
    """Of 8 ranks 4 share the experts, so 2 have the same ones; all 8 have the same of everything else."""
    config, (one,) = run(8, *MIXED, "parallel.ep=4", "parallel.zero=1")
    params = ModelSpec.of(config.model).params
    experts = sum(param.numel for param in params if param.experts)
    others = sum(param.numel for param in params) - experts
    assert experts == 5 * 8 * 3 * 64 * 96
    assert one.params == 2 * (others + experts // 4)
    assert one.optimizer == pytest.approx(12 * (others / 8 + experts / 4 / 2), rel=1e-3)


def test_tensor_parallel_experts_hold_parts_of_each() -> None:
    whole, half = (run(2, *MIXED, "parallel.tp=2", f"parallel.etp={etp}", "parallel.ep=1")[1][0] for etp in (1, 2))
    experts = 5 * 8 * 3 * 64 * 96
    assert whole.params - half.params == experts  # of 16 bits each: half of them


GPT = resolve_model(
    ModelConfig(
        num_layers=2, hidden_size=1024, num_heads=16, vocab_size=100, norm="layernorm", activation="gelu",
        position="learned", dropout=0.1, attention_dropout=0.1,
    ),
    512,
)  # fmt: skip
S, B, H, A = 512, 2, 1024, 16


@pytest.mark.parametrize(
    ("tp", "sequence", "recompute", "elements"),
    [
        (1, False, "none", S * B * H * (34 + 5 * A * S / H)),
        (4, False, "none", S * B * H * (10 + 24 / 4 + 5 * A * S / (H * 4))),
        (4, True, "none", S * B * H / 4 * (34 + 5 * A * S / H)),
        (4, False, "selective", S * B * H * (10 + 24 / 4)),
        (4, True, "selective", 34 * S * B * H / 4),
        (1, False, "full", 2 * S * B * H),
    ],
)
def test_explicit_attention_as_published(tp: int, sequence: bool, recompute: str, elements: float) -> None:
    """Korthikanti et al. 2022, table 2, which leaves out the norms' statistics and sums of exponentials."""
    way = Way(S, B, tp, sequence, recompute, 2, sequence, False, 1, 1, "explicit")
    kept = waiting(GPT, 0, way).kept
    statistics = 0 if recompute == "full" else 4 * 4 * S * B / (tp if sequence else 1)
    sums = 4 * S * B * A / tp if recompute == "none" else 0
    assert kept == elements + statistics + sums


def test_what_a_mixture_and_latent_attention_keep() -> None:
    """Counted by hand, in 16-bit numbers of a token: 2 of 4 experts of width 8, one that is shared; 2 heads."""
    model = ModelConfig(
        num_layers=1, hidden_size=16, num_heads=2, vocab_size=10, num_experts=4, top_k=2, moe_ffn_hidden_size=8,
        num_shared_experts=1, kv_lora_rank=6, q_lora_rank=10, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3,
    )  # fmt: skip
    way = Way(4, 1, 1, False, "none", 2, False, False, 1, 1)
    norms = 2 * (16 + 2)  # inputs, and 1 / rms in 32 bits
    latents = 16 + 2 * 10 + (6 + 2) + 6  # input; as made and as normed, but for the rotated part
    heads = 2 * 6 + 2 * (4 + 3) + 2 * 2 * 6 + 2 * 3  # q; k and v as made; q and k as they multiply; output
    sums = 2 * 2
    experts = 16 + 2 * 4 + 2 * (16 + 2 + 3 * 8)  # the router's input and probabilities; copies, weights, insides
    shared = 3 * 8
    assert waiting(resolve_model(model, 4), 0, way).kept == 4 * 2 * (norms + latents + heads + sums + experts + shared)


def test_each_axis_takes_its_part() -> None:
    _, (one,) = run(1)
    _, (two,) = run(2, "parallel.cp=2")
    assert two.activations < 0.55 * one.activations
    _, stages = run(4, "parallel.pp=4", "parallel.schedule=1f1b")
    assert [stages[0].activations > stage.activations for stage in stages[1:]] == [True] * 3
    for less in (("parallel.recompute=selective",), ("parallel.recompute=full",), ("parallel.recompute=offload",)):
        _, (rank,) = run(1, *less)
        assert rank.activations < one.activations
        assert (rank.host > 0) == ("offload" in less[0])


def test_fp8_keeps_two_codes_of_each_weight() -> None:
    config, (bf16,) = run(1)
    _, (fp8,) = run(1, "precision.fp8=current", "precision.fp8_skip_first=2")
    weights = [p for block in ModelSpec.of(config.model).blocks[2:] for p in block.params if p.is_matmul]
    assert fp8.buffers - bf16.buffers == 2 * sum(param.numel for param in weights)


def test_a_practice_changes_what_it_names() -> None:
    _, (ours,) = run(2, "parallel.zero=1")
    other = Practice(grad_bytes=2, optimizer_bytes=8, waste=0.0, context_gb=0.0)
    _, (theirs,) = run(2, "parallel.zero=1", practice=other)
    assert (theirs.grads, theirs.optimizer) == (ours.grads / 2, pytest.approx(ours.optimizer * 8 / 12, rel=1e-3))
    assert theirs.total == theirs.allocated < ours.allocated < ours.reserved < ours.total
    assert replace(ours, host=0).total == ours.total
