"""How each parameter is updated: its weight decay, its learning rate, or not at all."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megacore.config.errors import ConfigError, did_you_mean
from megacore.config.param_groups import param_groups
from megacore.config.schema import OptimConfig
from megacore.spec.params import ParamSpec


@dataclass(frozen=True)
class UpdateSettings:
    """``lr_scale`` multiplies the learning rate. What is ``frozen`` keeps its values, has no optimizer state and counts
    in no norm."""

    weight_decay: float
    lr_scale: float = 1.0
    frozen: bool = False


def settings_of(specs: Sequence[ParamSpec], optim: OptimConfig) -> Mapping[str, UpdateSettings]:
    """The settings of all parameters of the model, by global name and in their order.

    The first of ``optim.groups`` that matches a name has its say; what it leaves open, and parameters in no group, are
    as ever: weight decay ``optim.weight_decay`` but for norms, biases and embeddings. ``optim`` must be resolved.
    Raises ConfigError if a pattern has no effect, or if nothing is left to train.
    """
    if problems := list(_problems([spec.name for spec in specs], optim)):
        raise ConfigError(problems)
    settings = {}
    for spec in specs:
        usual = optim.weight_decay if spec.decay else 0.0
        group = next((each for each in param_groups(optim.groups) if fnmatchcase(spec.name, each.pattern)), None)
        settings[spec.name] = UpdateSettings(
            weight_decay=usual if group is None or group.weight_decay is None else group.weight_decay,
            lr_scale=1.0 if group is None or group.lr_scale is None else group.lr_scale,
            frozen=is_frozen(spec.name, optim),
        )
    return settings


def is_frozen(name: str, optim: OptimConfig) -> bool:
    """Whether the parameter is not trained."""
    return any(fnmatchcase(name, pattern) for pattern in optim.freeze)


def _problems(names: Sequence[str], optim: OptimConfig) -> Iterator[str]:
    left = set(names)
    for group, text in zip(param_groups(optim.groups), optim.groups):
        matched = {name for name in names if fnmatchcase(name, group.pattern)}
        if not matched:
            yield f'optim.groups holds "{text}", {_unmatched(group.pattern, names)}'
        elif not matched & left:
            yield f'optim.groups holds "{text}", but groups before it have all that it matches; move it before them'
        left -= matched
    trained = set(names)
    for pattern in optim.freeze:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            yield f'optim.freeze holds "{pattern}", {_unmatched(pattern, names)}'
        trained -= matched
    if not trained:
        yield f"optim.freeze={list(optim.freeze)} leaves no parameter to train; leave one of the patterns out"


def _unmatched(pattern: str, names: Sequence[str]) -> str:
    """What the user may have meant: names are compared with blocks' numbers left open, so that the list is short."""
    known = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    return f"which matches no parameter's name; {did_you_mean(pattern, known)}"
