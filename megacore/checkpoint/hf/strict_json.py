"""JSON of unknown origin: what is ambiguous, not finite or endless is refused by name."""

import json
import math
from typing import Any

MAX_BYTES = 64 << 20


def read_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object that ``data`` spells.

    Raises ValueError that begins with ``where`` for anything else, a key that stands twice in one object, numbers that
    are not finite, and more than 64 MiB.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"{where} has {len(data)} bytes, more than the {MAX_BYTES} that such a file may have")
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite
        )
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply to be what it should be") from None
    except ValueError as reason:  # UnicodeDecodeError and JSONDecodeError are such, too
        raise ValueError(f"{where} is not the JSON that it should be: {reason}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds {_kind(value)}, where a JSON object must be")
    return value


def write_object(value: dict[str, Any]) -> bytes:
    """As HF's own files look. Raises ValueError for numbers that are not finite."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice in one object")
        found[key] = value
    return found


def _constant(word: str) -> Any:
    raise ValueError(f"{word} is not a finite number")


def _finite(word: str) -> float:
    number = float(word)
    if not math.isfinite(number):
        raise ValueError(f"{word} is not a finite number")
    return number


def _kind(value: Any) -> str:
    names = ((list, "a list"), (str, "a text"), (bool, "true or false"), ((int, float), "a number"))
    return next((name for kind, name in names if isinstance(value, kind)), "null")
