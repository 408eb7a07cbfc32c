"""A run as text: flat, as TOML that loads to the same run, and as a hash."""

import hashlib
import json
from dataclasses import fields, is_dataclass
from typing import Any


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """``{"model.num_layers": 6, ...}`` in the schema's order; works on the run and on any section."""
    flat: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat


def to_toml(config: Any, usual: Any = None) -> str:
    """All keys as TOML; ``load`` of it gives ``config`` again. With ``usual``, only the keys that differ from it."""
    return "\n".join(_table(config, usual, "")).strip() + "\n"


def config_hash(config: Any) -> str:
    """16 hexadecimal digits that are equal for equal runs (or sections), on every machine."""
    return hashlib.sha256(to_toml(config).encode()).hexdigest()[:16]


def toml_value(value: Any) -> str:
    """One value as TOML."""
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML does not allow bare
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return repr(value)


def _table(section: Any, usual: Any, name: str) -> list[str]:
    own: list[str] = []
    tables: list[str] = []  # they come after the table's own keys
    for field in fields(section):
        value, common = getattr(section, field.name), getattr(usual, field.name, None)
        if is_dataclass(value):
            tables += _table(value, common, f"{name}.{field.name}" if name else field.name)
        elif usual is None or value != common:
            own.append(f"{field.name} = {toml_value(value)}")
    header = ["", f"[{name}]"] if name and own else []
    return [*header, *own, *tables]
