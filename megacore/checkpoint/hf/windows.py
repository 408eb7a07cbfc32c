"""Which layers see only a window of what came before: each family's way of saying so."""

from dataclasses import dataclass
from typing import Any

from megacore.checkpoint.hf.fields import Fields
from megacore.config.resolve import window_of
from megacore.config.schema import ModelConfig

SLIDING, FULL = "sliding_attention", "full_attention"


def windows_of(model: ModelConfig) -> tuple[int, ...]:
    """The window of each layer, 0 where it sees everything: two ways to say the same are equal here."""
    return tuple(window_of(model, layer) for layer in range(model.num_layers))


def layer_types(model: ModelConfig) -> list[str]:
    """As config.json lists them."""
    return [SLIDING if window else FULL for window in windows_of(model)]


@dataclass(frozen=True)
class SameWindow:
    """All layers have one (Mistral, Phi-3). ``default``: what absence means."""

    default: int

    @property
    def theirs(self) -> tuple[str, ...]:
        return ("sliding_window",)

    def read(self, config: Fields) -> dict[str, Any]:
        if config.has("layer_types") and set(config.texts("layer_types")) != {SLIDING}:
            raise config.wrong(
                "layer_types", f"is not supported for this model_type; leave it out, or {SLIDING} for all"
            )
        window = 0
        if "sliding_window" not in config.values or config.has("sliding_window"):
            window = config.integer("sliding_window", self.default)
        return {"sliding_window": window, "full_attention_every": 0, "sliding_window_from": 0}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        windows = set(windows_of(model))
        return {"sliding_window": max(windows) or None}


@dataclass(frozen=True)
class UpperWindows:
    """A flag, and layers from ``max_window_layers`` on or those that ``layer_types`` lists (Qwen2, Qwen3)."""

    @property
    def theirs(self) -> tuple[str, ...]:
        return ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

    def read(self, config: Fields) -> dict[str, Any]:
        if not config.flag("use_sliding_window", False):
            if config.has("layer_types") and SLIDING in config.texts("layer_types"):
                raise config.wrong("layer_types", f"has {SLIDING}, but use_sliding_window is not true; set one right")
            return _windows(0, 0, 0)
        window = 4096
        if "sliding_window" in config.values:
            window = config.integer("sliding_window", 0)  # null: none
        if config.has("layer_types"):
            return _of_types(config, window)
        first, layers = config.integer("max_window_layers", 28), config.integer("num_hidden_layers")
        return _windows(window, 0, first) if first < layers else _windows(0, 0, 0)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        types = layer_types(model)
        window = max(windows_of(model))
        first = types.index(SLIDING) if window else model.num_layers
        return {
            "use_sliding_window": window > 0,
            "sliding_window": window or None,
            "max_window_layers": first,
            "layer_types": types,
        }


@dataclass(frozen=True)
class TurnsOfWindows:
    """Every other layer has one, from the first on, or those that ``layer_types`` lists (Gemma-2)."""

    default: int

    @property
    def theirs(self) -> tuple[str, ...]:
        return ("sliding_window", "layer_types")

    def read(self, config: Fields) -> dict[str, Any]:
        window = self.default
        if "sliding_window" in config.values:
            window = config.integer("sliding_window", 0)
        if config.has("layer_types"):
            return _of_types(config, window)
        return _windows(window, 2 if window else 0, 0)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        window = max(windows_of(model))
        # their layers see everything without a window only if they are said to
        return {"sliding_window": window or self.default, "layer_types": layer_types(model)}


@dataclass(frozen=True)
class NoWindow:
    """None: a list of layers' kinds must say full attention throughout."""

    @property
    def theirs(self) -> tuple[str, ...]:
        return ()

    def read(self, config: Fields) -> dict[str, Any]:
        if config.has("layer_types") and set(config.texts("layer_types")) != {FULL}:
            raise config.wrong("layer_types", f"is not supported for this model_type; only {FULL} is")
        return _windows(0, 0, 0)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {}


def _windows(window: int, every: int, first: int) -> dict[str, Any]:
    return {"sliding_window": window, "full_attention_every": every, "sliding_window_from": first}


def _of_types(config: Fields, window: int) -> dict[str, Any]:
    """The windows that a list of layers' kinds means, in our words."""
    types, layers = config.texts("layer_types"), config.integer("num_hidden_layers")
    if len(types) != layers:
        raise config.wrong("layer_types", f"lists {len(types)} layers, but num_hidden_layers is {layers}")
    if unknown := set(types) - {SLIDING, FULL}:
        raise config.wrong("layer_types", f"has {sorted(unknown)[0]}; supported are {SLIDING} and {FULL}")
    if SLIDING not in types or not window:
        return _windows(0, 0, 0)
    first = types.index(SLIDING)
    full = [layer + 1 for layer in range(first, layers) if types[layer] == FULL]
    every = full[0] if full else 0
    # full layers before the first one with a window are either of the turns, or of the beginning
    for turns in (*sorted({number for number in (every, *range(1, layers + 1)) if number}), 0):
        for start in (0, first):
            found = [
                FULL if layer < start or (turns and (layer + 1) % turns == 0) else SLIDING for layer in range(layers)
            ]
            if tuple(found) == types:
                return _windows(window, turns, start)
    raise config.wrong(
        "layer_types", f"has no rule that we can say: {FULL} up to a layer, and then in every n-th, is supported"
    )
