"""One value, as TOML or a command line gives it, becomes the Python value of its key's type.

Files are read strictly (`"3e-4"` is a string, not a number). On a command line there are no types but the key's:
`precision.loss_scale=128` is the text "128", `optim.lr=.1` a number, `data.split=969,30,1` a list.
"""

import math
import tomllib
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_args, get_origin


@dataclass(frozen=True)
class Typed:
    """A value from the command line, not read yet: only its key's type says how."""

    text: str


LARGEST = 2**63 - 1
"""What counters, seeds and shapes can hold."""
SHOWN = 160
"""Letters of a value that a message shows."""


class Unfit(ValueError):
    """The value is not of the key's type; the message says what would be."""


def toml(text: str) -> dict[str, Any]:
    """A TOML document.

    Raises tomllib.TOMLDecodeError, also for what only Python's reader cannot take.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise tomllib.TOMLDecodeError("its brackets or names are nested too deeply") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # Python's own limit on digits
        raise tomllib.TOMLDecodeError("it holds a number of thousands of digits") from None


def literal(text: str) -> Any:
    """``text`` as a TOML value if it is one (and one that a run can hold), else the text itself."""
    try:
        table = toml(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = table["value"]
    if len(table) > 1 or not isinstance(value, (bool, int, float, str, list, dict)):
        return text
    return value


def coerce(value: Any, kind: Any) -> Any:
    """``value`` as an instance of ``kind`` (str, int, float, bool, or a tuple of them; a blend).

    Raises Unfit if it is none.
    """
    if isinstance(value, Typed):
        return _coerce_text(value.text, kind)
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if get_origin(item) is tuple:
            return _blend(value)
        return _sequence(value, item)
    return _SCALARS[kind](value)


def show(value: Any) -> str:
    """A value as a user would write it, text bare, everything else as TOML; fit for one line of a terminal."""
    try:
        written = _written(value)
    except RecursionError:
        written = "[" * (SHOWN + 1)
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in written[: SHOWN + 1])
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _written(value: Any) -> str:
    if isinstance(value, Typed):
        return value.text
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(f'"{item}"' if isinstance(item, str) else show(item) for item in value) + "]"
    if isinstance(value, int) and abs(value) > LARGEST:
        return hex(value)  # Python does not write thousands of decimals
    return str(value)


def _coerce_text(text: str, kind: Any) -> Any:
    value = literal(text)
    if kind is str:
        return value if isinstance(value, str) else text
    if isinstance(value, str) and kind in (int, float):
        try:  # `.1`, `1.` and `+3` are numbers to everybody but TOML
            value = float(value)
        except ValueError:
            pass
    return coerce(value, kind)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Unfit("must be true or false")
    return value


def _integer(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e6 steps
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unfit("must be an integer" + _quoted(value))
    if abs(value) > LARGEST:
        raise Unfit(f"must be at most {LARGEST}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Unfit("must be a number" + _quoted(value))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Unfit("must be a finite number")
    return number


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise Unfit("must be text; put it in quotes")
    return value


def _quoted(value: Any) -> str:
    return "; write it without quotes" if isinstance(value, str) and _is_number(value) else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _sequence(value: Any, item: Any) -> tuple[Any, ...]:
    """A tuple of ``item``; a lone value is a list of one, and numbers may stand in one text between commas."""
    if isinstance(value, str) and item is not str:
        words = [word.strip() for word in value.split(",")]
        value = [Typed(word) for word in words if word]
    if not isinstance(value, (list, tuple)):
        value = [value]
    try:
        return tuple(coerce(each, item) for each in value)
    except Unfit as error:
        raise Unfit(f"is a list, each item of which {error}") from None


def _blend(value: Any) -> tuple[tuple[float, str], ...]:
    """((weight, prefix), ...) from "prefix", ["prefix", ...] or [[weight, "prefix"], ...]."""
    if isinstance(value, str):
        value = [value] if value else []
    if not isinstance(value, (list, tuple)):
        raise Unfit('must be a list of [weight, "prefix"]')
    return tuple(_part(part) for part in value)


def _part(part: Any) -> tuple[float, str]:
    if isinstance(part, str):
        return 1.0, part
    if not isinstance(part, (list, tuple)) or len(part) != 2 or not isinstance(part[1], str):
        raise Unfit(f'must be a list of [weight, "prefix"], but holds {show(part)}')
    try:
        return _number(part[0]), part[1]
    except Unfit as error:
        raise Unfit(f"has a weight that {error}, in {show(part)}") from None


_SCALARS = MappingProxyType({str: _string, int: _integer, float: _number, bool: _boolean})
