"""The values of a config.json, each asked for by key and kind; what does not fit is said with file, key and value."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LARGEST = 1 << 40
"""Of any size in a config: beyond it something is wrong."""


@dataclass(frozen=True)
class Fields:
    """An object of a config; ``where`` is its file, and the path within it if it is not the whole."""

    values: Mapping[str, Any]
    where: str

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self.values.get(key) is not None

    def number(self, key: str, default: float | None = None) -> float:
        """A number; without a default it must be there."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(key, "must be a number")
        return float(value)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of 0 or more."""
        value = self._value(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "must be a whole number")
        if not 0 <= value <= LARGEST:
            raise self.wrong(key, "is out of range")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "must be true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A text."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "must be text")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts."""
        value = self._value(key, None)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.wrong(key, "must be a list of texts")
        return tuple(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of numbers."""
        value = self._value(key, None)
        numbers = isinstance(value, list) and all(
            isinstance(each, (int, float)) and not isinstance(each, bool) for each in value
        )
        if not numbers:
            raise self.wrong(key, "must be a list of numbers")
        return tuple(map(float, value))

    def object(self, key: str) -> "Fields":
        """An object within this one."""
        value = self._value(key, None)
        if not isinstance(value, dict):
            raise self.wrong(key, "must be an object")
        return Fields(value, f"{self.where}: {key}")

    def only(self, key: str, allowed: Iterable[Any], why: str = "") -> None:
        """The value must be absent or one of ``allowed``. Raises ValueError that says what is supported."""
        if self.has(key) and self.values[key] not in allowed:
            known = ", ".join(map(_shown, allowed))
            raise self.wrong(key, f"is not supported{f' ({why})' if why else ''}; supported is {known}")

    def wrong(self, key: str, rule: str) -> ValueError:
        """What to raise of a key's value."""
        return ValueError(f"{self.where}: {key}={_shown(self.values.get(key))} {rule}")

    def _value(self, key: str, default: Any) -> Any:
        if self.has(key):
            return self.values[key]
        if default is None:
            raise ValueError(f"{self.where} does not say {key}, which is needed")
        return default


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
