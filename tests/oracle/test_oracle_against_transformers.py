"""The plain decoder computes what `transformers` computes, in float64, and keeps the rules that no HF model shows.

HF's models turn to float32 by name for norms, softmax and rotary tables. `all_float64` makes those names mean
float64 while a model is built and run, so that the comparison is not blurred by rounding.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from unittest import mock

import pytest
import torch
from torch import Tensor

from megacore.config.schema import ModelConfig, RopeScaling
from tests.oracle.model import PlainDecoder, alibi_slopes, random_weights, rope_frequencies

transformers = pytest.importorskip("transformers")

LLAMA = ModelConfig(
    num_layers=3,
    hidden_size=48,
    ffn_hidden_size=80,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=101,
    max_positions=64,
)
GPT2 = replace(
    LLAMA,
    family="gpt2",
    num_kv_heads=6,
    head_dim=8,
    norm="layernorm",
    activation="gelu",
    position="learned",
    tie_embeddings=True,
    qkv_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
)
SCALINGS = {
    "none": RopeScaling(),
    "linear": RopeScaling(type="linear", factor=4.0),
    "yarn": RopeScaling(type="yarn", factor=4.0, original_seq_len=16),
    "yarn-long": RopeScaling(type="yarn", factor=8.0, original_seq_len=4096, attention_factor=1.3, beta_fast=20.0),
    "llama3": RopeScaling(type="llama3", factor=8.0, original_seq_len=32, low_freq_factor=1.0, high_freq_factor=4.0),
}


@contextlib.contextmanager
def all_float64() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "float32", torch.float64))
        stack.enter_context(mock.patch.object(torch, "float", torch.float64))
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        yield


def tokens_of(config: ModelConfig, b: int = 2, s: int = 40) -> Tensor:
    return torch.randint(config.vocab_size, (b, s), generator=torch.Generator().manual_seed(1))


def rope_parameters(config: ModelConfig) -> dict[str, object]:
    scaling = config.rope_scaling
    parameters: dict[str, object] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rotary_fraction != 1:
        parameters["partial_rotary_factor"] = config.rotary_fraction
    if scaling.type == "none":
        return parameters
    parameters |= {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type in ("yarn", "llama3", "longrope"):
        parameters["original_max_position_embeddings"] = scaling.original_seq_len
    if scaling.type == "yarn":
        parameters |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        parameters["attention_factor"] = scaling.attention_factor or None
    if scaling.type == "longrope":
        parameters |= {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}
        parameters["attention_factor"] = scaling.attention_factor or None
    if scaling.type == "llama3":
        parameters |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    return parameters


def hf_llama_like(config: ModelConfig, family: str, **more: object) -> torch.nn.Module:
    """An untrained HF model of the shape of `config`; eager attention, float64."""
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
        "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM),
        "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
        "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    }
    config_class, model_class = classes[family]
    hf_config = config_class(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=8192,
        pad_token_id=None,  # Phi-3's own lies beyond a small vocabulary
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters=rope_parameters(config),
        **more,
    )
    hf_config._attn_implementation = "eager"
    return model_class(hf_config).double().eval()


NORMS = {
    "pre": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {"attention_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"},
    "both": {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}
"""Ours to theirs, by where norms stand."""


def fused(weights: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Phi-3's names of what `load_llama_like` cuts apart: it keeps the fused matrices."""
    renamed = {}
    for layer in range(num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        renamed[f"{theirs}.self_attn.qkv_proj.weight"] = weights[f"{ours}.attention.qkv.weight"]
        renamed[f"{theirs}.mlp.gate_up_proj.weight"] = weights[f"{ours}.mlp.gate_up.weight"]
    return renamed


def load_llama_like(model: torch.nn.Module, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Give the HF model the oracle's weights, cutting the fused matrices apart."""
    renamed = {
        "model.embed_tokens.weight": weights["embedding.tokens.weight"],
        "model.norm.weight": weights["final_norm.weight"],
    }
    renamed["lm_head.weight"] = weights.get("head.weight", weights["embedding.tokens.weight"])
    rows = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        for norm, of_theirs in NORMS[config.norm_placement].items():
            renamed[f"{theirs}.{of_theirs}.weight"] = weights[f"{ours}.{norm}.weight"]
        for kind in ("weight", "bias"):
            if f"{ours}.attention.qkv.{kind}" in weights:
                parts = weights[f"{ours}.attention.qkv.{kind}"].split(rows)
                for letter, part in zip("qkv", parts, strict=True):
                    renamed[f"{theirs}.self_attn.{letter}_proj.{kind}"] = part
            if f"{ours}.attention.out.{kind}" in weights:
                renamed[f"{theirs}.self_attn.o_proj.{kind}"] = weights[f"{ours}.attention.out.{kind}"]
            if f"{ours}.mlp.down.{kind}" in weights:
                gate, up = weights[f"{ours}.mlp.gate_up.{kind}"].chunk(2)
                renamed[f"{theirs}.mlp.gate_proj.{kind}"], renamed[f"{theirs}.mlp.up_proj.{kind}"] = gate, up
                renamed[f"{theirs}.mlp.down_proj.{kind}"] = weights[f"{ours}.mlp.down.{kind}"]
        if config.qk_norm:
            for letter in "qk":
                renamed[f"{theirs}.self_attn.{letter}_norm.weight"] = weights[f"{ours}.attention.{letter}_norm.weight"]
    if hasattr(model.model.layers[0].self_attn, "qkv_proj"):
        parts = re.compile(r".*\.([qkv]|gate|up)_proj\..*")
        renamed = {name: weight for name, weight in renamed.items() if not parts.fullmatch(name)}
        renamed |= fused(weights, config.num_layers)
    model.load_state_dict(renamed, strict=True)


def assert_same_logits_and_loss(config: ModelConfig, family: str, **more: object) -> None:
    weights, tokens = random_weights(config), tokens_of(config)
    labels = tokens.roll(-1, dims=1)
    labels[:, -5:] = -100
    with all_float64():
        model = hf_llama_like(config, family, **more)
        load_llama_like(model, config, weights)
        theirs = model(tokens).logits
    oracle = PlainDecoder(config, weights)
    torch.testing.assert_close(oracle.forward(tokens), theirs, rtol=1e-10, atol=1e-10)
    expected = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(oracle.loss(tokens, labels), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_llama_with_rope_scaling(scaling: str) -> None:
    assert_same_logits_and_loss(replace(LLAMA, rope_scaling=SCALINGS[scaling]), "llama")


def test_llama_with_biases_tied_and_one_kv_head() -> None:
    config = replace(
        LLAMA, num_kv_heads=1, tie_embeddings=True, qkv_bias=True, attention_out_bias=True, mlp_bias=True, norm_eps=1e-3
    )
    assert_same_logits_and_loss(config, "llama", attention_bias=True, mlp_bias=True)


def test_static_ntk_is_a_larger_base() -> None:
    config = replace(LLAMA, rope_scaling=RopeScaling(type="ntk", factor=4.0))
    stretched = replace(LLAMA, rope_theta=LLAMA.rope_theta * 4.0 ** (16 / 14))
    weights, tokens = random_weights(config), tokens_of(config)
    torch.testing.assert_close(
        PlainDecoder(config, weights).forward(tokens),
        PlainDecoder(stretched, weights).forward(tokens),
        rtol=1e-12,
        atol=1e-12,
    )
    # what the rule is for: the slowest pair turns as under linear scaling, the fastest as without scaling
    plain, ntk = rope_frequencies(LLAMA)[0], rope_frequencies(config)[0]
    torch.testing.assert_close(ntk[-1], plain[-1] / 4)
    torch.testing.assert_close(ntk[0], plain[0])


def test_mistral_with_window() -> None:
    assert_same_logits_and_loss(replace(LLAMA, sliding_window=7), "mistral", sliding_window=7)


def test_qwen2() -> None:
    assert_same_logits_and_loss(replace(LLAMA, qkv_bias=True, rope_theta=1e6), "qwen2")


def test_qwen3() -> None:
    assert_same_logits_and_loss(replace(LLAMA, qk_norm=True, norm_eps=1e-6), "qwen3")


def test_qwen2_with_windows_in_its_last_layers() -> None:
    config = replace(LLAMA, qkv_bias=True, sliding_window=6, sliding_window_from=2)
    assert_same_logits_and_loss(
        config, "qwen2", use_sliding_window=True, sliding_window=config.sliding_window, max_window_layers=2
    )


@pytest.mark.parametrize("num_kv_heads", [1, 6])
def test_olmo2(num_kv_heads: int) -> None:
    config = replace(
        LLAMA, num_kv_heads=num_kv_heads, head_dim=8, norm_placement="post", qk_norm=True, qk_norm_over="all",
        norm_eps=1e-3, rope_theta=5e5,
    )  # fmt: skip
    assert_same_logits_and_loss(config, "olmo2")


def test_gemma2() -> None:
    """Theirs rounds the embeddings' factor to float32: one is taken that is a whole number."""
    config = replace(
        LLAMA, hidden_size=64, num_heads=4, norm_placement="both", norm_unit_offset=True, norm_eps=1e-6,
        activation="geglu", tie_embeddings=True, attention_scale_dim=24, attention_softcap=5.0, logit_softcap=3.0,
        scale_embeddings=True, sliding_window=7, full_attention_every=2,
    )  # fmt: skip
    assert_same_logits_and_loss(
        config,
        "gemma2",
        query_pre_attn_scalar=config.attention_scale_dim,
        attn_logit_softcapping=config.attention_softcap,
        final_logit_softcapping=config.logit_softcap,
        sliding_window=config.sliding_window,
    )


@pytest.mark.parametrize("original", [16, 40, 64])
def test_phi3_with_longrope(original: int) -> None:
    """Samples of 40 tokens: longer than the original length, as long, and shorter."""
    scaling = RopeScaling(
        type="longrope",
        factor=8192 / original,
        original_seq_len=original,
        short_factor=(1.0, 1.1, 1.25, 1.5, 2.0, 3.0),
        long_factor=(1.5, 2.0, 3.0, 5.0, 9.0, 20.0),
    )
    config = replace(LLAMA, rotary_fraction=0.75, rope_scaling=scaling, sliding_window=11, hidden_size=96)
    assert_same_logits_and_loss(
        config, "phi3", sliding_window=config.sliding_window, original_max_position_embeddings=original
    )


@pytest.mark.parametrize("parallel", [True, False])
def test_gpt_neox(parallel: bool) -> None:
    config = replace(
        LLAMA, num_kv_heads=6, head_dim=8, norm="layernorm", activation="gelu-erf", parallel_residual=parallel,
        rotary_fraction=0.25, qkv_bias=True, attention_out_bias=True, mlp_bias=True,
    )  # fmt: skip
    weights, tokens = random_weights(config), tokens_of(config)
    renamed = {
        "gpt_neox.embed_in.weight": weights["embedding.tokens.weight"],
        "lm_head.weight": weights["head.weight"],
        "gpt_neox.final_layer_norm.weight": weights["final_norm.weight"],
        "gpt_neox.final_layer_norm.bias": weights["final_norm.bias"],
    }
    names = {"attention_norm": "input_layernorm", "attention.qkv": "attention.query_key_value"}
    names |= {"attention.out": "attention.dense", "mlp_norm": "post_attention_layernorm"}
    names |= {"mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"}
    for layer in range(config.num_layers):
        for (ours, theirs), kind in product(names.items(), ("weight", "bias")):
            weight = weights[f"layers.{layer}.{ours}.{kind}"]
            if ours == "attention.qkv":  # theirs has each head's query, key and value rows together
                weight = weight.unflatten(0, (3, 6, 8)).transpose(0, 1).flatten(0, 2)
            renamed[f"gpt_neox.layers.{layer}.{theirs}.{kind}"] = weight
    with all_float64():
        hf_config = transformers.GPTNeoXConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.ffn_hidden_size,
            hidden_act="gelu",
            layer_norm_eps=config.norm_eps,
            use_parallel_residual=parallel,
            rope_parameters=rope_parameters(config),
        )
        hf_config._attn_implementation = "eager"
        model = transformers.GPTNeoXForCausalLM(hf_config).double().eval()
        model.load_state_dict(renamed, strict=True)
        theirs = model(tokens).logits
    torch.testing.assert_close(PlainDecoder(config, weights).forward(tokens), theirs, rtol=1e-10, atol=1e-10)


def test_geglu_is_gemmas_mlp() -> None:
    config = replace(LLAMA, activation="geglu")
    weights = random_weights(config)
    with all_float64():
        mlp = hf_llama_like(config, "gemma").model.layers[0].mlp
        gate, up = weights["layers.1.mlp.gate_up.weight"].chunk(2)
        mlp.load_state_dict(
            {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": weights["layers.1.mlp.down.weight"]}
        )
        x = torch.randn(2, 5, config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        theirs = mlp(x)
    torch.testing.assert_close(PlainDecoder(config, weights)._mlp("layers.1.mlp", x), theirs, rtol=1e-12, atol=1e-12)


def test_gpt2() -> None:
    config = GPT2
    weights, tokens = random_weights(config), tokens_of(config)
    renamed = {
        "transformer.wte.weight": weights["embedding.tokens.weight"],
        "transformer.wpe.weight": weights["embedding.positions.weight"],
        "lm_head.weight": weights["embedding.tokens.weight"],
        "transformer.ln_f.weight": weights["final_norm.weight"],
        "transformer.ln_f.bias": weights["final_norm.bias"],
    }
    names = {"attention_norm": "ln_1", "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj"}
    names |= {"mlp_norm": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    for layer in range(config.num_layers):
        for ours, theirs in names.items():
            weight = weights[f"layers.{layer}.{ours}.weight"]
            # HF's Conv1D keeps [in, out]
            renamed[f"transformer.h.{layer}.{theirs}.weight"] = weight.T if weight.dim() == 2 else weight
            renamed[f"transformer.h.{layer}.{theirs}.bias"] = weights[f"layers.{layer}.{ours}.bias"]
    with all_float64():
        hf_config = transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_positions,
            n_embd=config.hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_inner=config.ffn_hidden_size,
            layer_norm_epsilon=config.norm_eps,
            activation_function="gelu_new",
        )
        hf_config._attn_implementation = "eager"
        model = transformers.GPT2LMHeadModel(hf_config).double().eval()
        model.load_state_dict(renamed, strict=True)
        theirs = model(tokens).logits
    torch.testing.assert_close(PlainDecoder(config, weights).forward(tokens), theirs, rtol=1e-10, atol=1e-10)


def test_alibi_is_bloom_attention() -> None:
    """HF's Bloom builds the ALiBi bias by key position; softmax does not see the difference of a constant per row."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for num_heads in (4, 6, 12, 16):
        theirs = build_alibi_tensor(torch.ones(1, 9), num_heads, torch.float64).view(num_heads, 9)
        slopes = torch.tensor(alibi_slopes(num_heads), dtype=torch.float64)
        torch.testing.assert_close(slopes[:, None] * torch.arange(9), theirs, rtol=1e-6, atol=1e-6)
    bias = PlainDecoder(replace(LLAMA, position="alibi"), random_weights(LLAMA))._attention_bias(4, None)
    slope = alibi_slopes(LLAMA.num_heads)[2]
    assert bias[0, 2, 3].tolist() == pytest.approx([-3 * slope, -2 * slope, -slope, 0.0])
    assert bias[0, 2, 0, 1].item() == float("-inf")


@pytest.mark.parametrize("position", ["rope", "learned", "alibi", "none"])
@pytest.mark.parametrize("window", [0, 3])
def test_packed_documents_equal_documents_apart(position: str, window: int) -> None:
    """Two documents in one sequence, with positions and attention reset, give the logits that each gives alone."""
    config = replace(LLAMA, position=position, sliding_window=window)
    decoder, tokens = PlainDecoder(config, random_weights(config)), tokens_of(config, b=1, s=12)
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
    documents = torch.tensor([[0] * 5 + [1] * 7])
    packed = decoder.forward(tokens, positions, documents)
    apart = torch.cat((decoder.forward(tokens[:, :5]), decoder.forward(tokens[:, 5:])), dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu2"])
def test_gradients_are_the_slope_of_the_loss(activation: str) -> None:
    config = replace(LLAMA, num_layers=1, activation=activation, norm="layernorm", qk_norm=True, qkv_bias=True)
    weights, tokens = random_weights(config), tokens_of(config, s=8)
    labels = tokens.roll(-1, dims=1)
    labels[0, 2] = -100
    smoothing, z_loss, step = 0.1, 1e-3, 1e-6
    gradients = PlainDecoder(config, weights).gradients(tokens, labels, smoothing, z_loss)
    generator = torch.Generator().manual_seed(5)
    for name, weight in weights.items():
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        ends = [
            PlainDecoder(config, weights | {name: weight + sign * step * direction}).loss(
                tokens, labels, smoothing, z_loss
            )
            for sign in (1, -1)
        ]
        slope = ((ends[0] - ends[1]) / (2 * step)).item()
        assert (gradients[name] * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-8), name


def test_loss_terms_are_those_of_torch() -> None:
    weights, tokens = random_weights(LLAMA), tokens_of(LLAMA)
    labels = tokens.roll(-1, dims=1)
    labels[1, 3:9] = -100
    decoder = PlainDecoder(LLAMA, weights)
    logits = decoder.forward(tokens).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels.flatten(), label_smoothing=0.1)
    expected = expected + 1e-2 * logits.logsumexp(-1)[labels.flatten() != -100].square().mean()
    torch.testing.assert_close(
        decoder.loss(tokens, labels, label_smoothing=0.1, z_loss=1e-2), expected, rtol=1e-12, atol=0
    )


def test_weights_that_do_not_fit_are_refused() -> None:
    weights = random_weights(LLAMA)
    del weights["head.weight"]
    with pytest.raises(ValueError, match="head.weight"):
        PlainDecoder(LLAMA, weights)
    with pytest.raises(ValueError, match="dropout"):
        PlainDecoder(replace(LLAMA, dropout=0.1), random_weights(LLAMA))
