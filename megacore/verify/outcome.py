"""What came of one layout, as it is shown and written."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "outcomes.json"


@dataclass(frozen=True)
class Outcome:
    """One layout held against one process. ``excess``: the difference of the worst parameter's ``what`` (gradient or
    weight) in units of the bound; ``num_beyond`` parameters exceed it. The loss' and gradient norm's differences are
    relative. ``seconds``: building, one step and measuring."""

    layout: str
    label: str
    ranks: int
    stages: int
    schedule: str
    recompute: str
    microbatches: int
    loss: float
    loss_difference: float
    grad_norm: float
    grad_norm_difference: float
    parameter: str
    what: str
    excess: float
    num_beyond: int
    seconds: float
    problems: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether the layout computes what one process computes."""
        return self.excess <= 1 and not self.problems

    def to_json(self) -> dict[str, Any]:
        """JSON-able; what is not finite is null."""
        flat = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }
        return {**flat, "agrees": self.agrees}


def write(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Keep outcomes in a file of the folder."""
    (folder / FILE).write_text(json.dumps([asdict(outcome) for outcome in outcomes]))


def read(folder: Path) -> list[Outcome]:
    """What `write` kept."""
    return [
        Outcome(**{**entry, "problems": tuple(entry["problems"])}) for entry in json.loads((folder / FILE).read_text())
    ]
