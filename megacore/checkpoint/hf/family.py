"""A family of models as HF knows it, and the translation of its config.json to and from ours."""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from types import MappingProxyType
from typing import Any

from megacore.checkpoint.hf import families
from megacore.checkpoint.hf.fields import Fields
from megacore.checkpoint.hf.keys import Key
from megacore.checkpoint.hf.placement import Form, Placements, Same
from megacore.checkpoint.hf.rope import Rope, without_ntk
from megacore.checkpoint.hf.windows import windows_of
from megacore.config.families import FAMILIES
from megacore.config.resolve import resolve_model
from megacore.config.schema import ModelConfig, RunConfig, TrainConfig
from megacore.config.validate import validate

MAX_HEADS = 1 << 16
TRAINING_ONLY = frozenset({"dropout", "attention_dropout", "init_std", "init_scale_residual"})
"""Of no effect on what a trained model computes: a run file's business, not the weights'."""

WINDOWS = frozenset({"sliding_window", "full_attention_every", "sliding_window_from"})
LEFT_BEHIND = frozenset({"auto_map", "_name_or_path", "transformers_version", "torch_dtype", "dtype"})
"""Keys of another's config.json that are not handed on: of code and files that stay behind, or said anew."""


@dataclass(frozen=True)
class Family:
    """``ours`` is the name of ``model.family``; ``forms`` says where each of our modules lies (see `placement`),
    ``keys`` what config.json says.

    ``prefix`` is what the tensors of the bare model lack (GPT-2's first files). ``leftovers`` are patterns of buffers
    that older versions saved though they follow from the config. ``usual`` are keys of no effect on the maths that a
    new config.json gets.
    """

    ours: str
    model_type: str
    architecture: str
    prefix: str
    forms: Mapping[str, Form]
    keys: tuple[Key, ...]
    leftovers: tuple[str, ...] = ()
    usual: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def head(self) -> str:
        """The tensor of the output matrix."""
        form = self.forms["head"]
        assert isinstance(form, Same), form
        return f"{form.module}.weight"

    def read(self, config: Fields) -> ModelConfig:
        """The resolved model that config.json describes. Raises ValueError for what we cannot say."""
        values: dict[str, Any] = dict(FAMILIES[self.ours])
        for key in self.keys:
            values |= key.read(config)
        for name in ("num_layers", "hidden_size", "num_heads", "vocab_size"):
            if not values.get(name):
                raise ValueError(f"{config.where}: the model has no {name}; it must be at least 1")
        if values["num_heads"] > MAX_HEADS:
            raise ValueError(f"{config.where}: {values['num_heads']} heads are more than the {MAX_HEADS} supported")
        if not values.get("head_dim") and values["hidden_size"] % values["num_heads"]:
            raise ValueError(
                f"{config.where}: {values['num_heads']} heads do not divide hidden size {values['hidden_size']}"
            )
        model = resolve_model(ModelConfig(family=self.ours, **values), values.get("max_positions") or 2048)
        check_model(model, config.where)
        return model

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The keys of config.json that describe a resolved model. Raises ValueError where they cannot."""
        found: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for key in self.keys:
            found |= key.write(model)
        if problem := self._lost(model, found):
            raise ValueError(problem)
        Placements.make(self.forms, model)
        return found

    def _lost(self, model: ModelConfig, found: Mapping[str, Any]) -> str:
        """What of the model is read otherwise from ``found``, in words; nothing if all is the same."""
        back = self.read(Fields(found, f"the config.json of model_type {self.model_type}"))
        for name, mine, theirs in differences(model, back):
            return f"model.{name}={mine} cannot be said in HF's model_type {self.model_type}, where it is {theirs}"
        return ""

    def merge(
        self, model: ModelConfig, original: Mapping[str, Any], ids: Mapping[str, Any], vocab_rows: int, dtype: str
    ) -> dict[str, Any]:
        """A whole config.json: what ``original`` says beyond the model stays, and how it says what is still so. Without
        an original, ``ids`` of special tokens and what is usual are put in its place.

        ``dtype`` as torch calls it ("float32"); ``vocab_rows`` are the rows that the tensors have.
        """
        written = self.write(model)
        kept = {key: value for key, value in original.items() if key not in LEFT_BEHIND}
        before, now = (Fields(each, "the config.json that came with the weights") for each in (kept, written))
        for key in self.keys:
            # rotary positions are said in the ways of both versions of transformers, whatever was there
            if not isinstance(key, Rope) and _same(key, before, now, model):
                continue
            for name in key.theirs:
                kept.pop(name, None)
            kept |= key.write(model)
        usual = {} if original else {"initializer_range": model.init_std, "use_cache": True, **self.usual, **ids}
        said = {"architectures": [self.architecture], "model_type": self.model_type, "vocab_size": vocab_rows}
        merged = {**usual, **kept, **said, "dtype": dtype, "torch_dtype": dtype}
        if problem := self._lost(replace(model, vocab_size=vocab_rows), merged):
            raise ValueError(problem)
        return dict(sorted(merged.items()))


def _same(key: Key, before: Fields, now: Fields, model: ModelConfig) -> bool:
    """Whether both say the same of ``key``; a 0 stands for what follows from the rest of the model."""
    try:
        then, said = key.read(before), key.read(now)
    except ValueError:
        return False
    for name, value in then.items():
        follows = not value and getattr(resolve_model(replace(model, **{name: value}), model.max_positions), name)
        if value != said[name] and not (follows and follows == said[name]):
            return False
    return True


@cache
def known_families() -> tuple[Family, ...]:
    """All of `families/`, by name."""
    names = sorted(each.name for each in pkgutil.iter_modules(families.__path__))
    modules = (importlib.import_module(f"{families.__name__}.{name}") for name in names)
    return tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))


def family_of(config: Fields) -> Family:
    """The family of a config.json. Raises ValueError for a ``model_type`` that is not built in."""
    word = config.text("model_type")
    for family in known_families():
        if family.model_type == word:
            break
    else:
        more = "; its auto_map names code to run, which is never done" if config.has("auto_map") else ""
        known = ", ".join(each.model_type for each in known_families())
        raise config.wrong("model_type", f"is not supported{more}; supported are {known}")
    if config.has("quantization_config"):
        raise config.wrong("quantization_config", "is not supported; take the weights that were not quantised")
    for key in ("num_experts", "num_local_experts"):
        config.only(key, (0, 1), "mixtures of experts are not")
    return family


def family_for(model: ModelConfig) -> tuple[Family, ModelConfig]:
    """The family that can say all of a resolved model, its own first, and the model as it is said.

    Raises ValueError with what its own family cannot say, if none can.
    """
    model = without_ntk(model)
    reason = ""
    for family in sorted(known_families(), key=lambda each: each.ours != model.family):
        try:
            family.write(model)
        except ValueError as problem:
            reason = reason or str(problem)
        else:
            return family, replace(model, family=family.ours)
    raise ValueError(f"{reason}; no other family of HF has all that this model has either")


def differences(one: ModelConfig, other: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """(key, value, other value) of what matters to the maths of trained models and differs."""
    one, other = without_ntk(one), without_ntk(other)
    for each in fields(ModelConfig):
        name = each.name
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine != theirs and name != "family" and name not in TRAINING_ONLY | WINDOWS:
            yield name, mine, theirs
    if one.num_layers == other.num_layers and windows_of(one) != windows_of(other):
        mine, theirs = ("/".join(map(str, dict.fromkeys(windows_of(each)))) for each in (one, other))
        yield "sliding_window", mine, theirs


def check_model(model: ModelConfig, where: str) -> None:
    """Raise ValueError for a model that breaks a rule of ours."""
    run = RunConfig(model=model, train=TrainConfig(seq_len=1))
    problems = [line for line in validate(run, None) if line.startswith("model.")]
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}")
