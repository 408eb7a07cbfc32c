"""Rotary positions: what config.json says in one object (transformers 5) or in several keys (4), and we in ours.

Both spellings are written, so that either version reads the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megacore.checkpoint.hf.fields import Fields
from megacore.config.resolve import resolve_model, rotary_dims
from megacore.config.schema import ModelConfig, RopeScaling

LEGACY = (("su", "longrope"),)
"""Older names of methods."""


@dataclass(frozen=True)
class Rope:
    """``base``: the key of the base (and of the turning share, ``share``, where the family has one) outside the object.

    ``methods``: what the family's code does. ``outside``: whether the original length stands outside, too (Phi-3).
    """

    methods: tuple[str, ...] = ("none", "linear", "yarn", "llama3", "longrope")
    base: str = "rope_theta"
    share: str = ""
    usual_share: float = 1.0
    outside: bool = False
    renamed: tuple[tuple[str, str], ...] = LEGACY

    @property
    def theirs(self) -> tuple[str, ...]:
        outside = ("original_max_position_embeddings",) if self.outside else ()
        return ("rope_parameters", "rope_scaling", self.base, *((self.share,) if self.share else ()), *outside)

    def read(self, config: Fields) -> dict[str, Any]:
        # where both stand, transformers 5 believes the older one
        inner = next((config.object(key) for key in ("rope_scaling", "rope_parameters") if config.has(key)), None)
        if inner is not None and (kinds := [key for key, value in inner.values.items() if isinstance(value, dict)]):
            raise inner.wrong(kinds[0], "is a setting for one kind of layers; one for all layers is supported")
        places = [config] if inner is None else [inner, config]
        theta = _first(places, ("rope_theta", self.base), 1e4)
        share = _first(places, ("partial_rotary_factor", self.share), self.usual_share)
        if share != 1 and not self.share:
            raise ValueError(
                f"{config.where}: partial_rotary_factor={share} is not supported for this model_type; supported is 1"
            )
        scaling = RopeScaling() if inner is None else self._scaling(inner, config)
        return {"rope_theta": theta, "rotary_fraction": share, "rope_scaling": scaling}

    def _scaling(self, inner: Fields, config: Fields) -> RopeScaling:
        key = "rope_type" if inner.has("rope_type") else "type"
        word = inner.text(key, "default")
        method = "none" if word == "default" else dict(self.renamed).get(word, word)
        if method not in self.methods:
            known = ", ".join("default" if each == "none" else each for each in self.methods)
            raise inner.wrong(key, f"is not supported for this model_type; supported are {known}")
        if method == "none":
            return RopeScaling()
        longest = config.integer("max_position_embeddings", 2048)
        values: dict[str, Any] = {"type": method}
        if method != "linear":
            own = inner.integer("original_max_position_embeddings", longest)
            values["original_seq_len"] = config.integer("original_max_position_embeddings", own)
        if method == "longrope":
            values |= {name: inner.numbers(name) for name in ("short_factor", "long_factor")}
            values["factor"] = inner.number("factor", max(1.0, longest / max(1, values["original_seq_len"])))
            values["attention_factor"] = inner.number("attention_factor", 0.0)
        else:
            values["factor"] = inner.number("factor")
        if method == "llama3":
            values |= {name: inner.number(name) for name in ("low_freq_factor", "high_freq_factor")}
        if method == "yarn":
            inner.only("truncate", (True,))
            values |= {"beta_fast": _or(inner, "beta_fast", 32.0), "beta_slow": _or(inner, "beta_slow", 1.0)}
            values["attention_factor"] = _yarn_attention(inner, values["factor"])
        return RopeScaling(**values)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        scaling = model.rope_scaling
        inner = self._inner(model)
        share = {"partial_rotary_factor": model.rotary_fraction} if self.share else {}
        found: dict[str, Any] = {
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta, **share, **inner},
            "rope_scaling": None,
            self.base: model.rope_theta,
        }
        if self.share:
            found[self.share] = model.rotary_fraction
        if self.outside:
            found["original_max_position_embeddings"] = scaling.original_seq_len or model.max_positions
        if inner:
            older = {"type": inner["rope_type"], **inner}
            if self.outside and not {"factor", "attention_factor"} & inner.keys():
                # Phi-3's code in transformers 4 takes exactly these three
                older = {name: older[name] for name in ("type", "short_factor", "long_factor")}
            found["rope_scaling"] = older
        return found

    def _inner(self, model: ModelConfig) -> dict[str, Any]:
        """The method and its numbers, without those that follow from others."""
        scaling = model.rope_scaling
        if scaling.type == "none":
            return {}
        inner: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
        if scaling.type != "linear":
            inner["original_max_position_embeddings"] = scaling.original_seq_len
        if scaling.type == "llama3":
            inner |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        if scaling.type == "yarn":
            inner |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.type == "longrope":
            inner |= {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}
            if self.outside and scaling.factor == max(1.0, model.max_positions / scaling.original_seq_len):
                del inner["factor"]
        if scaling.attention_factor and scaling.attention_factor != _usual_attention(model):
            inner["attention_factor"] = scaling.attention_factor
        return inner


def without_ntk(model: ModelConfig) -> ModelConfig:
    """The same model, its larger base said as one: HF has no name for static NTK scaling. It must be resolved."""
    if model.rope_scaling.type != "ntk":
        return model
    d = rotary_dims(model)
    base = model.rope_theta * model.rope_scaling.factor ** (d / (d - 2))
    return replace(model, rope_theta=base, rope_scaling=RopeScaling())


def _first(places: Sequence[Fields], keys: Sequence[str], default: float) -> float:
    return next((place.number(key) for place in places for key in keys if place.has(key)), default)


def _usual_attention(model: ModelConfig) -> float:
    open_ended = replace(model, rope_scaling=replace(model.rope_scaling, attention_factor=0.0))
    return resolve_model(open_ended, model.max_positions).rope_scaling.attention_factor


def _or(inner: Fields, key: str, default: float) -> float:
    """null and 0 mean the default here."""
    return inner.number(key, default) or default


def _yarn_attention(inner: Fields, factor: float) -> float:
    """The factor on cos and sin; 0 where it follows from ``factor``."""
    if inner.has("attention_factor"):
        return inner.number("attention_factor")
    over, under = inner.number("mscale", 0.0), inner.number("mscale_all_dim", 0.0)
    if not over or not under:
        return 0.0
    log = 0.1 * math.log(factor) if factor > 1 else 0.0
    return (over * log + 1.0) / (under * log + 1.0)
