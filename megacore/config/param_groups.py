"""What ``optim.groups`` says: "PATTERN: lr_scale=0.1, weight_decay=0" gives parameters settings of their own."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megacore.config.errors import did_you_mean

SETTINGS = ("lr_scale", "weight_decay")


@dataclass(frozen=True)
class ParamGroup:
    """Settings of the parameters whose names match ``pattern`` (as fnmatch does); None: as for all others."""

    pattern: str
    lr_scale: float | None = None
    weight_decay: float | None = None


def param_groups(texts: Sequence[str]) -> tuple[ParamGroup, ...]:
    """The groups that legal ``texts`` stand for, in order."""
    return tuple(ParamGroup(_pattern(text), **dict(_settings(text))) for text in texts)


def param_group_problems(texts: Sequence[str]) -> Iterator[str]:
    """A line for everything that keeps ``texts`` from being read."""
    for text in texts:
        what = f'optim.groups holds "{text}"'
        names = [name for name, _ in _words(text)]
        if not _pattern(text) or not names:
            yield f'{what}; write "PATTERN: NAME=number, ...", such as "*.bias: lr_scale=0.1, weight_decay=0"'
        for name, value in _words(text):
            if name not in SETTINGS:
                yield f"{what}, but there is no {name or 'setting without a name'}; {did_you_mean(name, SETTINGS)}"
            elif not 0 <= _number(value) < math.inf:
                yield f'{what}, where {name} is "{value}"; it must be a number of at least 0'
            elif names.count(name) > 1:
                yield f"{what}, which gives {name} {names.count(name)} times; give it once"


def _pattern(text: str) -> str:
    return text.partition(":")[0].strip()


def _words(text: str) -> Iterator[tuple[str, str]]:
    """(name, value) as they are written."""
    for word in text.partition(":")[2].split(","):
        if word.strip():
            name, _, value = word.partition("=")
            yield name.strip(), value.strip()


def _settings(text: str) -> Iterator[tuple[str, float]]:
    for name, value in _words(text):
        yield name, _number(value)


def _number(value: str) -> float:
    """nan where it is no number."""
    try:
        return float(value)
    except ValueError:
        return math.nan
