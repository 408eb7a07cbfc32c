"""The FLOPs that the spec states against those that torch counts in a real step, and against counting pairs."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megacore.config.resolve import resolve_model
from megacore.config.schema import ModelConfig
from megacore.kernels.table import resolve
from megacore.model.inputs import Inputs
from megacore.model.stage import Loss, Objective, Stage
from megacore.parallel.parameters import ParameterMaker
from megacore.parallel.tensor import TensorParallel
from megacore.spec import ModelSpec
from megacore.spec.flops import (
    block_flops_per_token,
    forward_flops_per_token,
    train_flops_per_token,
    unit_flops_per_token,
)

BATCH, LENGTH = 2, 12
TINY = ModelConfig(num_layers=2, hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=6, vocab_size=37)
MODELS = (
    TINY,
    replace(TINY, tie_embeddings=True, qk_norm=True),
    replace(TINY, norm="layernorm", activation="gelu", position="learned", qkv_bias=True, mlp_bias=True),
    replace(TINY, norm_placement="both", parallel_residual=True, attention_softcap=2.0, logit_softcap=3.0),
)


def counted(model: ModelConfig, backward: bool) -> int:
    """What torch counts: every product of matrices, attention's over all pairs of tokens."""
    cpu, tp = torch.device("cpu"), TensorParallel.single()
    kernels, _ = resolve(cpu, torch.float32, {"attention": "reference"})
    make = ParameterMaker(ModelSpec.of(model).by_name, tp.group, cpu, torch.float32, seed=0)
    stage = Stage(model, make, tp, kernels, Objective(), range(model.num_layers))
    token_bs = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % model.vocab_size
    with FlopCounterMode(display=False) as counter:
        loss = stage(Inputs(token_bs, token_bs, torch.arange(BATCH)))
        assert isinstance(loss, Loss)
        if backward:
            loss.objective.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("model", MODELS)
def test_torch_counts_the_same(model: ModelConfig) -> None:
    model = resolve_model(model, LENGTH)
    spec, num_tokens = ModelSpec.of(model), BATCH * LENGTH
    assert counted(model, backward=False) == num_tokens * forward_flops_per_token(spec, LENGTH, causal=False)
    assert counted(model, backward=True) == num_tokens * train_flops_per_token(spec, LENGTH, causal=False)


@pytest.mark.parametrize("model", MODELS)
def test_a_causal_model_is_charged_half_of_attention(model: ModelConfig) -> None:
    spec = ModelSpec.of(resolve_model(model, LENGTH))
    products = 6 * spec.num_matmul_params
    full = train_flops_per_token(spec, LENGTH, causal=False) - products
    assert full == 12 * model.num_layers * model.num_heads * model.head_dim * LENGTH
    assert train_flops_per_token(spec, LENGTH) - products == full / 2


@pytest.mark.parametrize("window", [1, 2, 5, LENGTH - 1])
def test_a_sliding_window_is_charged_for_the_pairs_it_shows(window: int) -> None:
    spec = ModelSpec.of(resolve_model(replace(TINY, sliding_window=window), LENGTH))
    visible = sum(min(token + 1, window) for token in range(LENGTH)) / LENGTH
    products = 2 * spec.num_matmul_params
    expected = 4 * TINY.num_layers * TINY.num_heads * TINY.head_dim * visible
    assert forward_flops_per_token(spec, LENGTH) - products == pytest.approx(expected)


def test_layers_that_see_everything_are_charged_for_it() -> None:
    model = resolve_model(replace(TINY, num_layers=5, sliding_window=3), LENGTH)
    window, full = (
        forward_flops_per_token(ModelSpec.of(replace(model, sliding_window=wide)), LENGTH) for wide in (3, 0)
    )
    for more, num_full in (({"full_attention_every": 2}, 2), ({"sliding_window_from": 3}, 3)):
        spec = ModelSpec.of(replace(model, **more))
        expected = (num_full * full + (5 - num_full) * window) / 5
        assert forward_flops_per_token(spec, LENGTH) == pytest.approx(expected)
        units = unit_flops_per_token(spec, LENGTH)
        blocks = [block_flops_per_token(spec, LENGTH, layer) for layer in range(5)]
        assert sum(blocks) + units.head == pytest.approx(expected)
        assert len(set(blocks)) == 2 and units.block == pytest.approx(sum(blocks) / 5)


def test_a_window_beyond_the_sample_changes_nothing() -> None:
    model = resolve_model(TINY, LENGTH)
    whole = forward_flops_per_token(ModelSpec.of(model), LENGTH)
    assert forward_flops_per_token(ModelSpec.of(replace(model, sliding_window=LENGTH)), LENGTH) == whole


def test_a_tied_output_matrix_is_paid_for_though_it_is_stored_once() -> None:
    model = resolve_model(TINY, LENGTH)
    untied, tied = ModelSpec.of(model), ModelSpec.of(replace(model, tie_embeddings=True))
    assert tied.num_params == untied.num_params - model.vocab_size * model.hidden_size
    assert tied.num_matmul_params == untied.num_matmul_params


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_mixture_is_charged_for_the_experts_that_a_token_is_sent_to(top_k: int) -> None:
    """Router and attention are whole, and so is what all tokens go through; the first layer is dense."""
    mixed = replace(TINY, num_experts=5, top_k=top_k, moe_ffn_hidden_size=10, num_shared_experts=2, num_dense_layers=1)
    m = resolve_model(mixed, LENGTH)
    spec, h = ModelSpec.of(m), m.hidden_size
    attention = h * m.head_dim * (2 * m.num_heads + 2 * m.num_kv_heads)
    dense, experts = 3 * h * m.ffn_hidden_size, 3 * h * 10 * (top_k + 2) + 5 * h
    matrices = 2 * attention + dense + experts + m.vocab_size * h
    assert spec.num_matmul_params == matrices
    scores = 6 * 2 * m.num_heads * m.head_dim * LENGTH
    assert train_flops_per_token(spec, LENGTH) == 6 * matrices + scores


def test_latent_attention_scores_with_wider_heads_than_it_mixes() -> None:
    latent = replace(TINY, num_kv_heads=0, head_dim=0, kv_lora_rank=8, q_lora_rank=12, v_head_dim=5)
    m = resolve_model(replace(latent, qk_nope_head_dim=4, qk_rope_head_dim=2), LENGTH)
    spec = ModelSpec.of(m)
    heads = 6 * m.num_layers * m.num_heads * LENGTH * (6 + 5) / 2
    assert train_flops_per_token(spec, LENGTH) == 6 * spec.num_matmul_params + heads
