"""JSON-lines files that survive a crash: one object per line, appended whole, repaired on reopening."""

import json
import math
from collections.abc import Callable
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from megacore.data.files import write_atomic

ENCODE = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


class JsonLines:
    """Appends objects to a `.jsonl` file, one write per line, so that a reader never waits for a buffer.

    A run that was killed in the middle of a line leaves half an object; opening the file again cuts it off (or
    only adds the missing line break, if the object is whole).
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        repair_last_line(path)
        self._file = path.open("ab", buffering=0)

    def append(self, record: dict[str, Any]) -> None:
        """Writes one object. NaN and infinities become null and are named under "nonfinite" (see `finite`)."""
        try:
            line = ENCODE(record)
        except ValueError:  # seldom: looking for what is not finite takes longer than writing
            line = ENCODE(finite(record))
        self._file.write(line.encode("utf-8", "surrogatepass") + b"\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """The record as strict JSON can hold it.

    JSON has no NaN or infinity, yet a run that diverges must say so: such a value is written as null, and
    `"nonfinite": {"loss": "nan", "statistics.gradient_norm.mlp": "inf"}` is added, so null alone still means "not
    known".
    """
    odd: dict[str, str] = {}
    clean = _without_odd(record, "", odd)
    return clean | {"nonfinite": odd} if odd else record


def _without_odd(record: dict[str, Any], prefix: str, odd: dict[str, str]) -> dict[str, Any]:
    """The record with null for what is not finite, which goes to ``odd`` by dotted name."""
    clean = {}
    for name, value in record.items():
        if isinstance(value, dict):
            value = _without_odd(value, f"{prefix}{name}.", odd)
        elif isinstance(value, float) and not math.isfinite(value):
            odd[prefix + name] = repr(value)
            value = None
        clean[name] = value
    return clean


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All objects of the file, non-finite values restored; a half-written last line is left out.

    Raises ValueError for a bad line elsewhere.
    """
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                continue  # still being written, or cut short by a crash
            raise ValueError(f"{path}, line {number}: not JSON ({error}); remove the line") from None
        records.append(restored(record))
    return records


def restored(record: dict[str, Any]) -> dict[str, Any]:
    """A record as it was before ``finite``; it is changed in place."""
    for name, value in record.pop("nonfinite", {}).items():
        *outer, last = name.split(".")
        reduce(getitem, outer, record)[last] = float(value)
    return record


def drop_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> int:
    """Keep only the objects that are wanted, each as it stands; returns how many went. The file has its old lines or
    the new ones, whatever happens."""
    if not path.exists():
        return 0
    repair_last_line(path)
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if wanted(json.loads(line))]
    if len(kept) < len(lines):
        write_atomic(path, b"".join(kept))
    return len(lines) - len(kept)


def repair_last_line(path: Path) -> None:
    """Ends the file with a whole line: completes it by a line break, or cuts off half an object."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        if not content or content.endswith(b"\n"):
            return
        start = content.rfind(b"\n") + 1
        try:
            json.loads(content[start:])
        except ValueError:
            file.truncate(start)
        else:
            file.write(b"\n")
