"""Every rule that a run must keep. All are checked, and all that fail are told at once."""

import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import Field, fields, is_dataclass
from typing import Any

from megacore.config.bounds import out_of_bounds
from megacore.config.errors import ConfigError, did_you_mean
from megacore.config.parse import show
from megacore.config.rules import RULES
from megacore.config.schema import ModelConfig, RunConfig
from megacore.config.supported import unsupported
from megacore.config.write import flatten


def check(config: RunConfig, world_size: int, more: Collection[str] = ()) -> None:
    """Raise ConfigError with everything that keeps ``config`` from training on ``world_size`` ranks, and with ``more``
    that the caller found."""
    problems = [*validate(config, world_size), *unsupported(config), *more]
    if problems:
        raise ConfigError(problems)


def validate(config: RunConfig, world_size: int | None, unread: Collection[str] = ()) -> list[str]:
    """What breaks a rule, one line each; with ``world_size`` None, what it would break on any number of ranks.

    A line says the key, its value, the rule and the fix. Resolved and unresolved runs are taken alike. What is
    legal but not built yet is `supported.unsupported`'s. ``unread`` are keys and sections known to be wrong already:
    nothing is said about them, nor by a rule that reads them.
    """
    single = {**dict(out_of_bounds(flatten(config))), **dict(_choices(config)), **dict(_required(config.model))}
    single |= dict(_control_characters(config))
    wrong = {*unread, *single}
    problems = [line for key, line in single.items() if not _overlap((key,), unread)]
    for rule, reads in RULES:
        if not _overlap(wrong, reads):
            problems += rule(config, world_size)
    return problems


def choice_problem(key: str, field: Field[Any], value: Any) -> str:
    """What is wrong with ``value`` where the field has choices (of which a file may be one), else nothing."""
    choices, suffix = field.metadata["choices"], field.metadata.get("file")
    if not choices or value in choices or (suffix and value.endswith(suffix)):
        return ""
    listed = ", ".join(choices)
    hint = did_you_mean(value, choices).removeprefix(f"known are {listed}")
    file = f", nor a {suffix} file" if suffix else ""
    return f"{key}={show(value)} is not one of {listed}{file}" + (f"; {hint}" if hint else "")


def _overlap(some: Collection[str], others: Collection[str]) -> bool:
    """Whether a key or section of one lot is, or lies in, one of the other."""
    return any(f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.") for a in some for b in others)


def _required(model: ModelConfig) -> Iterator[tuple[str, str]]:
    for field in fields(model):
        value = getattr(model, field.name)
        if field.metadata.get("required") and value < 1:
            key, what = f"model.{field.name}", field.metadata["help"]
            if value == 0:
                yield key, f"{key} is missing ({what}); give a number above 0"
            else:
                yield key, f"{key}={value} is out of range ({what}); it must be at least 1"


def _control_characters(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Names of files, folders and the like hold none, a command may hold tabs and new lines; prompts are free."""
    blends = {"data.blend": config.data.blend, "data.eval_blend": config.data.eval_blend}
    texts = {key: value for key, value in flatten(config).items() if isinstance(value, str)}
    texts |= {key: "".join(prefix for _, prefix in blend) for key, blend in blends.items()}
    for key, text in texts.items():
        if odd := [letter for letter in text if unicodedata.category(letter) == "Cc" and letter not in "\n\t"]:
            yield key, f"{key}={show(text)} holds the control character {ascii(odd[0])[1:-1]}; write it without"


def _choices(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for field in fields(section):
        value, key = getattr(section, field.name), prefix + field.name
        if is_dataclass(value):
            yield from _choices(value, f"{key}.")
        elif problem := choice_problem(key, field, value):
            yield key, problem
