"""The settings that Megatron-LM saved with a checkpoint, as our model; what we do not have is refused by name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megacore.checkpoint.hf.family import check_model
from megacore.checkpoint.hf.fields import Fields
from megacore.checkpoint.megatron.unpickle import Record
from megacore.config.resolve import resolve_model
from megacore.config.schema import ModelConfig, RopeScaling

REFUSED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "num_experts": (None, 0),
        "multi_latent_attention": (None, False),
        "experimental_attention_variant": (None,),
        "linear_attention_freq": (None,),
        "hybrid_layer_pattern": (None,),
        "hybrid_override_pattern": (None,),
        "hybrid_attention_ratio": (None, 0, 0.0),
        "hybrid_mlp_ratio": (None, 0, 0.0),
        "mtp_num_layers": (None, 0),
        "heterogeneous_layers_config_path": (None, ""),
        "heterogeneous_layers_config_encoded_json": (None, ""),
        "retro_add_retriever": (None, False),
        "attention_output_gate": (None, False),
        "qk_l2_norm": (None, False),
        "softmax_type": (None, "vanilla"),
        "softmax_scale": (None,),
        "rotary_interleaved": (None, False),
        "no_rope_freq": (None,),
        "apply_residual_connection_post_layernorm": (None, False),
        "quick_geglu": (None, False),
        "glu_linear_offset": (None, 0, 0.0),
        "activation_func_clamp_value": (None,),
        "use_mup": (None, False),
        "enable_hyper_connections": (None, False),
        "moe_layer_freq": (None, 1),
        "fp8_param_gather": (None, False),
        "fp4_param_gather": (None, False),
    }
)
"""Settings that change the maths or the format, with the values that we know; all absent means the first."""

# The constants of Megatron-Core's RotaryEmbedding._apply_scaling, which are Llama 3.1's.
LLAMA3_LENGTH, LLAMA3_LOW, LLAMA3_HIGH = 8192, 1.0, 4.0


def model_of(args: Record, where: str, vocab_size: int = 0) -> tuple[ModelConfig, tuple[str, ...]]:
    """The resolved model that saved settings describe, and notes on what had to be supposed.

    ``vocab_size``: of the tokenizer (0: as saved, else with the rows that were added to fill up). Raises ValueError for
    what our models do not have, naming the setting.
    """
    fields = Fields(args.fields, f"the args in {where}")
    for key, allowed in REFUSED.items():
        value = fields.values.get(key)
        if not any(type(value) is type(each) and value == each for each in allowed):
            said = value.origin if isinstance(value, Record) else repr(value)
            raise ValueError(f"{fields.where}: {key}={said} is not supported; supported is {allowed[-1]!r}")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if not heads or not hidden:
        raise ValueError(f"{fields.where}: hidden_size={hidden} and num_attention_heads={heads} must be at least 1")
    biases, grouped = fields.flag("add_bias_linear", True), fields.flag("group_query_attention", False)
    values: dict[str, Any] = {
        "num_layers": fields.integer("num_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": fields.integer("ffn_hidden_size", 4 * hidden),
        "num_heads": heads,
        "num_kv_heads": fields.integer("num_query_groups", heads) if grouped else heads,
        "head_dim": fields.integer("kv_channels", hidden // heads),
        "tie_embeddings": not fields.flag("untie_embeddings_and_output_weights", False),
        "qkv_bias": biases or fields.flag("add_qkv_bias", False),
        "attention_out_bias": biases,
        "mlp_bias": biases,
        "dropout": fields.number("hidden_dropout", 0.0),
        "attention_dropout": fields.number("attention_dropout", 0.0),
        "init_std": fields.number("init_method_std", 0.02),
        "activation": _activation(fields, biases),
        **_norms(fields),
        **_positions(fields),
        **_windows(fields),
    }
    values["vocab_size"], notes = _vocabulary(fields, vocab_size)
    values["family"] = _family(values)
    positions = fields.integer("max_position_embeddings", fields.integer("seq_length", 2048))
    model = resolve_model(ModelConfig(**values), positions)
    check_model(model, fields.where)
    return model, notes


def is_gated(args: Record) -> bool:
    """Whether linear_fc1 holds two projections."""
    return bool(args.fields.get("swiglu")) or bool(args.fields.get("quick_geglu"))


def _activation(fields: Fields, biases: bool) -> str:
    if fields.flag("swiglu", False):
        return "swiglu"
    if fields.flag("squared_relu", False):
        return "relu2"
    # The fused kernel, which needs a bias, has the tanh form; what runs without it is exact.
    fused = biases and fields.flag("bias_gelu_fusion", True)
    return "gelu" if fused or fields.flag("openai_gelu", False) else "gelu-erf"


def _norms(fields: Fields) -> dict[str, Any]:
    kind = fields.text("normalization", "LayerNorm")
    if kind not in ("LayerNorm", "RMSNorm"):
        raise fields.wrong("normalization", "is not supported; supported are LayerNorm and RMSNorm")
    offset = fields.flag("apply_layernorm_1p", False) or fields.flag("layernorm_zero_centered_gamma", False)
    if offset and kind == "LayerNorm":
        raise fields.wrong("apply_layernorm_1p", "is supported with RMSNorm only")
    heads = fields.flag("qk_layernorm", False)
    if heads and kind == "LayerNorm":
        raise fields.wrong("qk_layernorm", "is supported with RMSNorm only")
    eps = fields.number("norm_epsilon", fields.number("layernorm_epsilon", 1e-5))
    norm = "rmsnorm" if kind == "RMSNorm" else "layernorm"
    return {"norm": norm, "norm_eps": eps, "norm_unit_offset": offset, "qk_norm": heads}


def _positions(fields: Fields) -> dict[str, Any]:
    kind = fields.text("position_embedding_type", "learned_absolute")
    if fields.flag("use_rotary_position_embeddings", False):
        kind = "rope"
    if kind == "none" or (kind == "learned_absolute" and not fields.flag("add_position_embedding", True)):
        return {"position": "none"}
    if kind == "learned_absolute":
        return {"position": "learned"}
    if kind != "rope":
        raise fields.wrong("position_embedding_type", "is not supported; supported are learned_absolute, rope and none")
    scaling, longer = RopeScaling(), fields.number("rotary_seq_len_interpolation_factor", 0.0)
    if fields.flag("use_rope_scaling", False):
        if longer:
            raise fields.wrong("use_rope_scaling", "is not supported together with rotary_seq_len_interpolation_factor")
        scaling = RopeScaling(
            type="llama3",
            factor=fields.number("rope_scaling_factor", 8.0),
            original_seq_len=LLAMA3_LENGTH,
            low_freq_factor=LLAMA3_LOW,
            high_freq_factor=LLAMA3_HIGH,
        )
    elif longer:
        scaling = RopeScaling(type="linear", factor=longer)
    return {
        "position": "rope",
        "rope_theta": fields.number("rotary_base", 10000.0),
        "rotary_fraction": fields.number("rotary_percent", 1.0),
        "rope_scaling": scaling,
    }


def _windows(fields: Fields) -> dict[str, Any]:
    window, every = fields.values.get("window_size"), fields.values.get("window_attn_skip_freq")
    if window is None:
        return {}
    before = window[0] if isinstance(window, (tuple, list)) and len(window) == 2 and window[1] in (0, -1) else None
    if type(before) is not int or before < 0:
        raise fields.wrong("window_size", "is not supported; supported is (tokens before, 0)")
    if every is not None and type(every) is not int:
        raise fields.wrong("window_attn_skip_freq", "is not supported; supported is a number of layers")
    return {"sliding_window": before + 1, "full_attention_every": every or 0}


def _vocabulary(fields: Fields, vocab_size: int) -> tuple[int, tuple[str, ...]]:
    padded = fields.integer("padded_vocab_size", 0) or fields.integer("vocab_size", 0)
    own = fields.integer("vocab_size", 0)
    if not padded:
        raise fields.wrong("padded_vocab_size", "must be at least 1")
    if vocab_size:
        if not 0 < vocab_size <= padded:
            raise ValueError(f"--vocab-size {vocab_size} is out of range: {fields.where} have {padded} rows")
        return vocab_size, ()
    if own and own <= padded:
        return own, ()
    return padded, (
        f"the vocabulary has {padded} rows, of which the last may be padding; --vocab-size N keeps the tokenizer's N",
    )


def _family(values: Mapping[str, Any]) -> str:
    """The nearest family by name; every feature is said, so that nothing follows from it."""
    if values["norm"] == "layernorm":
        return "gpt2"
    if values["qk_norm"]:
        return "qwen3"
    return "qwen2" if values["qkv_bias"] and not values["mlp_bias"] else "llama"
