"""Stages cut by FLOPs: the units add up to the model, and the split follows them."""

from dataclasses import replace

import pytest

from megacore.config.load import load
from megacore.config.resolve import resolve, resolve_model
from megacore.config.schema import ModelConfig
from megacore.spec import ModelSpec
from megacore.spec.flops import forward_flops_per_token, unit_flops_per_token
from megacore.spec.stages import flops_of_stages, layers_of_stages, params_of_stages

TINY = ModelConfig(num_layers=6, hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=6, vocab_size=37)
MODELS = (
    TINY,
    replace(TINY, tie_embeddings=True, position="learned", sliding_window=5),
    replace(TINY, norm="layernorm", activation="gelu", qkv_bias=True, mlp_bias=True),
)


@pytest.mark.parametrize("model", MODELS)
def test_units_add_up_to_the_model(model: ModelConfig) -> None:
    model = resolve_model(model, 12)
    spec = ModelSpec.of(model)
    flops = unit_flops_per_token(spec, 12)
    assert model.num_layers * flops.block + flops.head == forward_flops_per_token(spec, 12)
    assert 0 < flops.embedding < flops.block / 50
    for num_stages in (1, 2, 3, 8):
        stages = layers_of_stages(model, 12, num_stages)
        assert sum(flops_of_stages(model, 12, stages)) == pytest.approx(sum(flops) + 5 * flops.block)


def test_a_large_vocabulary_lightens_the_last_stage() -> None:
    # the output matrix of Llama 3 8B, 128,256 x 4,096, is worth 2.1 of its blocks at 8,192 tokens
    model = resolve(load(None, ["train.seq_len=8192"], preset="llama3-8b"), 1).model
    assert [len(layers) for layers in layers_of_stages(model, 8192, 4)] == [8, 9, 9, 6]
    assert [len(layers) for layers in layers_of_stages(model, 8192, 8)] == [4, 5, 5, 4, 4, 4, 4, 2]
    assert [len(layers) for layers in layers_of_stages(model, 8192, 4, (8, 8, 8, 8))] == [8, 8, 8, 8]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("home", [(0,), (0, 1), (0, 1, 1, 0), (0, 1, 2, 0, 1, 2), tuple(range(8))])
def test_ranks_hold_every_parameter_once_but_for_a_tied_copy(model: ModelConfig, home: tuple[int, ...]) -> None:
    model = resolve_model(model, 12)
    spec = ModelSpec.of(model)
    stages = layers_of_stages(model, 12, len(home))
    held = [[stage for stage, its in enumerate(home) if its == rank] for rank in range(max(home) + 1)]
    of_ranks = [params_of_stages(spec, stages, stages_held) for stages_held in held]
    copied = [spec.by_name["embedding.tokens.weight"]] if model.tie_embeddings and home[0] != home[-1] else []
    assert sorted(p.name for params in of_ranks for p in params) == sorted(p.name for p in [*spec.params, *copied])
    for params, of_rank in zip(of_ranks, held):
        names = [param.name for param in params]
        assert len(set(names)) == len(names)
        assert ("embedding.tokens.weight" in names) == (0 in of_rank or bool(copied) and len(home) - 1 in of_rank)
        blocks = {int(name.split(".")[1]) for name in names if name.startswith("layers.")}
        assert blocks == {layer for stage in of_rank for layer in stages[stage]}
