"""What passes between two lines of a run's figures: time, tokens, and steps without an update.

Adding a step never waits for the device; reading does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megacore.pipeline.clock import Mark

if TYPE_CHECKING:
    from megacore.train.loop import Late


MAX_MARKS = 100
"""Steps whose times are kept unread: the device is done with the oldest by then, and long gaps take no memory."""


@dataclass(frozen=True)
class Span:
    """The steps that one line stands for."""

    first_step: int
    last_step: int
    tokens_per_s: float
    step_time_s: float
    num_skipped: int


class Meter:
    """Adds up steps until they are read."""

    def __init__(self, first_step: int = 1) -> None:
        self._begin(first_step)

    def _begin(self, step: int) -> None:
        self._first_step = self._next_step = step
        self._tokens, self._seconds = 0, 0.0
        self._skipped: Tensor | None = None
        self._marks: list[tuple[Mark, Mark]] = []

    def add(self, late: Late) -> None:
        """One more step."""
        self._next_step = late.step + 1
        self._tokens += late.tokens
        skipped = late.result.skipped
        self._skipped = skipped if self._skipped is None else self._skipped + skipped
        self._marks.append((late.began, late.ended))
        if len(self._marks) > MAX_MARKS:
            self._add_seconds()

    def _add_seconds(self) -> None:
        self._seconds += sum(ended.seconds_since(began) for began, ended in self._marks)
        self._marks = []

    def read(self) -> Span:
        """The steps since the last reading, of which there must be one; evaluations between them do not count."""
        self._add_seconds()
        assert self._skipped is not None, "a line stands for one step at least"
        span = Span(
            first_step=self._first_step,
            last_step=self._next_step - 1,
            tokens_per_s=self._tokens / self._seconds,
            step_time_s=self._seconds / (self._next_step - self._first_step),
            num_skipped=int(self._skipped.item()),
        )
        self._begin(self._next_step)
        return span


class Skips:
    """Steps without an update since the run began."""

    def __init__(self, device: torch.device, before: int = 0) -> None:
        """``before``: how many there were before this process took the run up."""
        self._in_row = self._longest = torch.zeros((), dtype=torch.float64, device=device)
        self._total = self._in_row + before

    def add(self, skipped: Tensor) -> None:
        """``skipped`` is 1 or 0, a scalar on the device."""
        self._total = self._total + skipped
        self._in_row = (self._in_row + skipped) * skipped
        self._longest = torch.maximum(self._longest, self._in_row)

    @property
    def total(self) -> int:
        """How many there were."""
        return int(self._total.item())

    @property
    def longest_row(self) -> int:
        """The most that followed each other."""
        return int(self._longest.item())
