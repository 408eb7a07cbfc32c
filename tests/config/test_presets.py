"""The presets' shapes against the parameter counts that the models' authors published."""

import pytest

from megacore.config.load import load
from megacore.config.presets import preset_names, preset_path
from megacore.config.resolve import resolve, window_of
from megacore.spec import ModelSpec

# Sums over the published checkpoints' tensors; tied matrices count once.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "pythia-1b": 1_011_781_632,
    "olmo2-7b": 7_298_617_344,
    "phi3-mini": 3_821_079_552,
    "gemma2-9b": 9_241_705_984,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-v2": 235_741_434_880,
    # published, in billions: 174.6, 1008.0, 15.6, 341.0, 671.0, 15.96; the rest follows from the published shapes
    "gpt3-175b": 174_604_259_328,
    "gpt-1t": 1_008_038_758_400,
    "nemotron-4-15b": 15_628_775_424,
    "nemotron-4-340b": 341_029_195_776,
    "deepseek-v3": 671_026_404_352,
    "moonlight-16b-a3b": 15_960_108_544,
}

# Parameters that one token meets, in billions, as the authors round them.
ACTIVE = {
    "mixtral-8x7b": 12.9,
    "mixtral-8x22b": 39,
    "qwen3-30b-a3b": 3.3,
    "qwen3-235b-a22b": 22,
    "deepseek-v2": 21,
    "deepseek-v3": 37,
    "moonlight-16b-a3b": 2.91,
}


def counted_by_hand(m):
    """Parameters of a decoder, written down independently of megacore.spec."""
    h, f, d = m.hidden_size, m.ffn_hidden_size, m.head_dim
    query, kv = m.num_heads * d, m.num_kv_heads * d
    norm = h * (2 if m.norm == "layernorm" else 1)
    attention = latent(m) if m.kv_lora_rank else h * (query + 2 * kv) + query * h
    attention += (query + 2 * kv if m.qkv_bias else 0) + (h if m.attention_out_bias else 0)
    attention += (query + kv if m.qk_norm_over == "all" else 2 * d) if m.qk_norm else 0
    gated = m.activation in ("swiglu", "geglu")
    mlp = h * f * (3 if gated else 2)
    mlp += (f * (2 if gated else 1) + h) if m.mlp_bias else 0
    experts = m.num_experts * (3 * h * m.moe_ffn_hidden_size + h) + 3 * h * m.moe_ffn_hidden_size * m.num_shared_experts
    mixtures = m.num_layers - m.num_dense_layers if m.num_experts else 0
    embeddings = m.vocab_size * h * (1 if m.tie_embeddings else 2)
    embeddings += m.max_positions * h if m.position == "learned" else 0
    blocks = m.num_layers * (attention + (4 if m.norm_placement == "both" else 2) * norm)
    return embeddings + blocks + (m.num_layers - mixtures) * mlp + mixtures * experts + norm


def latent(m):
    """Attention of DeepSeek-V2 (2024, section 2.1), with the norms of its latents."""
    h, heads, c, q = m.hidden_size, m.num_heads, m.kv_lora_rank, m.q_lora_rank
    head = m.qk_nope_head_dim + m.qk_rope_head_dim
    queries = h * q + q + q * heads * head if q else h * heads * head
    kv = h * (c + m.qk_rope_head_dim) + c + c * heads * (m.qk_nope_head_dim + m.v_head_dim)
    return queries + kv + heads * m.v_head_dim * h


@pytest.mark.parametrize("name", preset_names())
def test_parameter_counts(name):
    model = resolve(load(None, preset=name), 1).model
    count = counted_by_hand(model)
    assert ModelSpec.of(model).num_params == count
    assert name == "demo" or count == PUBLISHED[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_parameters_that_a_token_meets(name):
    spec = ModelSpec.of(resolve(load(None, preset=name), 1).model)
    assert spec.num_active_params / 1e9 == pytest.approx(ACTIVE[name], rel=0.02)


def test_every_published_model_is_there():
    assert set(preset_names()) == {"demo", *PUBLISHED}


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_names_its_source(name):
    assert preset_path(name).read_text(encoding="utf-8").startswith("# ")


def test_details_that_no_count_shows():
    models = {name: load(None, preset=name).model for name in preset_names()}
    assert all(models[name].rope_theta == 500_000 for name in models if name.startswith("llama3"))
    assert all(models[name].rope_theta == 1e6 and models[name].norm_eps == 1e-6 for name in models if "qwen3" in name)
    assert all(models[name].qk_norm for name in models if "qwen3" in name)
    assert models["llama3-8b"].rope_scaling.type == models["llama3-70b"].rope_scaling.type == "none"
    scaling = models["llama3-405b"].rope_scaling
    assert (scaling.type, scaling.factor, scaling.original_seq_len) == ("llama3", 8.0, 8192)
    assert (scaling.low_freq_factor, scaling.high_freq_factor) == (1.0, 4.0)
    assert models["mistral-7b"].sliding_window == 4096
    assert (models["phi3-mini"].sliding_window, models["olmo2-7b"].rope_theta) == (2047, 5e5)
    assert (models["qwen2.5-7b"].rope_theta, models["qwen2.5-7b"].norm_eps) == (1e6, 1e-6)
    assert models["pythia-1b"].parallel_residual and models["pythia-1b"].rotary_fraction == 0.25
    gemma2 = models["gemma2-9b"]
    assert (gemma2.attention_softcap, gemma2.logit_softcap, gemma2.attention_scale_dim) == (50.0, 30.0, 256)
    assert [window_of(gemma2, layer) for layer in (0, 1, 40, 41)] == [4096, 0, 4096, 0]
    assert models["gpt2-124m"].max_positions == 1024
