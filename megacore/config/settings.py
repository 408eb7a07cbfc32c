"""An optimizer's hyper-parameters: what the keys of [optim] say, over the optimizer's own defaults.

The common ones have keys of their own, where -1 means the optimizer's default. What only one optimizer has stands
in ``optim.options`` as "name=value".
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from megacore.config.errors import did_you_mean
from megacore.config.optimizers import defaults, kept, state
from megacore.config.schema import OptimConfig

OWN = -1.0
"""Stands for the optimizer's own value."""


def settings(optim: OptimConfig) -> Mapping[str, float]:
    """A value for every hyper-parameter of ``optim.name``; the section must be legal, and may be resolved or not."""
    given = {name: value for name, value in _keys(optim).items() if value != OWN} | _options(optim)
    return MappingProxyType({name: given.get(name, value) for name, value in defaults(optim.name).items()})


def resolve_settings(optim: OptimConfig) -> OptimConfig:
    """The section with every hyper-parameter that its optimizer has; keys that it has not stay -1."""
    values, keys = settings(optim), _keys(optim)
    options = tuple(f"{name}={_text(value)}" for name, value in values.items() if name not in keys)
    own: dict[str, Any] = {name: value for name, value in values.items() if name in keys}
    return replace(optim, options=options, **own)


def setting_problems(optim: OptimConfig) -> Iterator[str]:
    """A line for each hyper-parameter that the optimizer does not have or that is no number."""
    own, keys = defaults(optim.name), _keys(optim)
    for name, value in keys.items():
        if value != OWN and name not in own:
            yield f"optim.{name}={value} is not known to {optim.name}, which has {', '.join(own)}; leave it out"
    if optim.state_dtype != "auto" and not {"moment", "square"} & {*kept(state(optim.name), settings(optim)).values()}:
        yield f"optim.state_dtype={optim.state_dtype} has no effect on {optim.name}, which has its own; leave it out"
    seen: set[str] = set()
    for option in optim.options:
        name, equals, text = (part.strip() for part in option.partition("="))
        if not equals or _number(text) is None:
            yield f'optim.options holds "{option}"; write "name=number"'
        elif name in keys:
            yield f'optim.options holds "{option}", which has a key of its own; write optim.{name}={text}'
        elif name not in own:
            others = [each for each in own if each not in keys]
            hint = did_you_mean(name, others) if others else "leave it out"
            yield f'optim.options holds "{option}", but {optim.name} has no {name}; {hint}'
        elif name in seen:
            yield f'optim.options holds {name} twice, once as "{option}"; leave one out'
        seen.add(name)


def _keys(optim: OptimConfig) -> dict[str, float]:
    """The hyper-parameters with keys of their own."""
    return {
        "beta1": optim.beta1,
        "beta2": optim.beta2,
        "eps": optim.eps,
        "momentum": optim.momentum,
        "weight_decay": optim.weight_decay,
    }


def _options(optim: OptimConfig) -> dict[str, float]:
    pairs = (option.partition("=") for option in optim.options)
    return {name.strip(): _number(text) or 0.0 for name, _, text in pairs}


def _number(text: str) -> float | None:
    """``text`` as a finite number (true is 1, false 0), or None."""
    word = text.strip()
    try:
        value = {"true": 1.0, "false": 0.0}[word] if word in ("true", "false") else float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _text(value: float) -> str:
    """As few digits as give the number back."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)
