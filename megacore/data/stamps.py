"""Knows whether a stage of a preparation is up to date: what each was last made from, in one small file."""

import hashlib
import json
from pathlib import Path
from typing import Any

from megacore.data.files import write_atomic


class Stamps:
    """Fingerprints of the inputs of stages, by the stages' names.

    path: the JSON file that keeps them. fresh: forget them, so that every stage is done again.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        self.made: dict[str, str] = {} if fresh else _read(path)

    def current(self, stage: str, inputs: Any, *results: Path) -> bool:
        """Whether the stage's results are there and were made from these inputs."""
        return self.made.get(stage) == fingerprint(inputs) and all(path.exists() for path in results)

    def begin(self, stage: str) -> None:
        """Forgets the stage, so that one that breaks off is never taken for done."""
        if self.made.pop(stage, None):
            self._write()

    def done(self, stage: str, inputs: Any) -> None:
        """Notes that the stage's results were made from these inputs."""
        self.made[stage] = fingerprint(inputs)
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(self.made, indent=1).encode())


def fingerprint(inputs: Any) -> str:
    """16 hexadecimal digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, str]:
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # not there yet, or spoilt: everything is made again
    return made if isinstance(made, dict) else {}
