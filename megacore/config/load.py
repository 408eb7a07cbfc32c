"""From a preset, a file and overrides to one `RunConfig`.

Later sources win: family < preset < file < overrides. Every problem of every source is collected and raised
at once.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from megacore.config.errors import ConfigError
from megacore.config.families import FAMILIES
from megacore.config.parse import SHOWN, Typed, Unfit, coerce, literal, show, toml
from megacore.config.presets import preset_path
from megacore.config.schema import ModelConfig, RunConfig
from megacore.config.validate import choice_problem, validate

SHORT: Mapping[str, str] = MappingProxyType({"profile": "log.profile"})
"""Keys that may be given without their section on a command line."""


def load(path: str | None, overrides: Sequence[str] = (), preset: str | None = None) -> RunConfig:
    """The run that ``preset``, the TOML file ``path`` and ``section.key=value`` overrides describe together.

    Derived values are still 0 (see `resolve.resolve`) and rules are not checked yet (see `validate.check`).
    Raises ConfigError with everything that cannot be read.
    """
    problems: list[str] = []
    tree: dict[str, Any] = {}
    if preset:
        _merge(tree, _read(preset_path(preset), problems))
    if path:
        _merge(tree, _read(Path(path), problems))
    unreadable = bool(problems)
    for override in overrides:
        _override(tree, override, problems)
    if unreadable:  # rules would only complain of all that the file holds
        raise ConfigError(problems)
    config, broken = _build(RunConfig, tree, "", problems)
    if problems:
        # Rules are checked on what could be read, so that the user sees everything in one go.
        raise ConfigError(problems + validate(config, None, broken))
    return config


def from_tree(tree: Mapping[str, Any], where: str) -> RunConfig:
    """The run that nested sections describe, as a checkpoint keeps them; keys that are not given have their defaults.

    Raises ConfigError where one cannot be read; ``where`` says what holds them.
    """
    problems: list[str] = []
    config, _ = _build(RunConfig, tree, "", problems)
    if problems:
        raise ConfigError([f"{where}: {problem}" for problem in problems])
    return config


def _read(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
        return toml(text)
    except FileNotFoundError:
        problems.append(f"there is no run file {show(str(path))}; `megacore presets` lists what --preset takes instead")
    except OSError as error:
        problems.append(f"the run file {show(str(path))} cannot be read: {error.strerror}; name a file in TOML")
    except UnicodeDecodeError:
        problems.append(f"the run file {path} is not UTF-8 text; a run file is written in TOML")
    except tomllib.TOMLDecodeError as error:
        problems.append(f"the run file {show(str(path))} is not TOML: {error}{_line_of(str(error), text)}")
    return {}


def _line_of(error: str, text: str) -> str:
    """The line that a reader's complaint names, to be read beside it."""
    named = re.search(r"at line (\d+)", error)
    lines = text.splitlines()
    line = lines[int(named[1]) - 1].strip() if named and int(named[1]) <= len(lines) else ""
    return f": {show(line)}; mend that line" if line else "; `megacore config show --preset NAME` prints a good one"


def _merge(tree: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Lay ``more`` over ``tree``, key by key."""
    for name, value in more.items():
        if isinstance(value, Mapping) and isinstance(tree.get(name), dict):
            _merge(tree[name], value)
        else:
            tree[name] = dict(value) if isinstance(value, Mapping) else value


def _override(tree: dict[str, Any], override: str, problems: list[str]) -> None:
    """Lay ``section.key=value`` over ``tree``."""
    key, equals, text = override.partition("=")
    key = SHORT.get(key.strip(), key)
    names = [name.strip() for name in key.split(".")]
    if not equals or not all(names):
        problems.append(f"the argument {show(override)!r} is not an override; write section.key=value")
        return
    value = literal(text)
    leaf: Any = value if isinstance(value, dict) else Typed(text.strip())
    for name in reversed(names):
        leaf = {name: leaf}
    _merge(tree, leaf)


def _build(cls: Any, tree: Mapping[str, Any], prefix: str, problems: list[str]) -> tuple[Any, set[str]]:
    """The section ``cls`` from ``tree``, and the keys that could not be read (they keep their defaults)."""
    known = {field.name: field for field in fields(cls)}
    kinds = get_type_hints(cls)
    values: dict[str, Any] = {}
    broken: set[str] = set()
    if cls is ModelConfig:
        values |= FAMILIES.get(_family(tree), {})
    for name, value in tree.items():
        plain = name.isprintable() and 0 < len(name) <= SHOWN and "." not in name
        key = prefix + (name if plain else f'"{show(name)}"')
        if name not in known:
            problems.append(f"{key} is not a key of a run; {_suggest(key)}")
        elif is_dataclass(kinds[name]):
            if isinstance(value, Mapping):
                values[name], inner = _build(kinds[name], value, f"{key}.", problems)
                broken |= inner
            else:
                problems.append(f"{key}={show(value)} is a section; write {key}.KEY=value")
                broken.add(key)
        else:
            problem = _set(values, known[name], kinds[name], key, value)
            if problem:
                problems.append(problem)
                broken.add(key)
    return cls(**values), broken


def _set(values: dict[str, Any], field: Field[Any], kind: Any, key: str, value: Any) -> str:
    """Read one key into ``values``; what is wrong with it, else nothing."""
    if isinstance(value, Mapping):
        return f"{key} is a key, not a section; write {key}=value"
    try:
        read = coerce(value, kind)
    except Unfit as error:
        return f"{key}={show(value)} {error} ({field.metadata['help']})"
    problem = choice_problem(key, field, read)
    if not problem:
        values[field.name] = read
    return problem


def _family(tree: Mapping[str, Any]) -> str:
    """The family that a model section names; a broken name is reported where the key itself is read."""
    try:
        return coerce(tree.get("family", ModelConfig.family), str)
    except Unfit:
        return ModelConfig.family


def all_keys(cls: Any = RunConfig, prefix: str = "") -> dict[str, Field[Any]]:
    """``{"model.num_layers": field, ...}``: every key that a run file may hold."""
    keys: dict[str, Field[Any]] = {}
    kinds = get_type_hints(cls)
    for field in fields(cls):
        if is_dataclass(kinds[field.name]):
            keys |= all_keys(kinds[field.name], f"{prefix}{field.name}.")
        else:
            keys[prefix + field.name] = field
    return keys


def _suggest(key: str) -> str:
    """What may have been meant: a key of the same name elsewhere, one spelled alike, or the names that there are."""
    section, _, name = key.rpartition(".")
    keys = {other: other.rpartition(".")[2] for other in all_keys()}
    siblings = {other: last for other, last in keys.items() if other.rpartition(".")[0] == section}
    if not section:
        siblings = {field.name: field.name for field in fields(RunConfig)}
    for names in (siblings, keys):
        if near := get_close_matches(name, names.values(), n=1, cutoff=0.6):
            return f"did you mean {' or '.join(other for other, last in names.items() if last == near[0])}?"
    return f"known are {', '.join(siblings.values())}"
