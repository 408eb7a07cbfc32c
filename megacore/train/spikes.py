"""Losses that jump: told, or undone by going back before them and leaving out the batch that brought them.

PaLM (Chowdhery et al. 2022, section 5.1) met about 20 spikes, went back some 100 steps each time and left out 200 to
500 batches: the same batches did no harm from another state, so it is the meeting of both that is to be avoided.

How far a loss lies from what is usual is a robust z-score: its distance from the median of the last few losses, in
units of how much neighbouring losses usually differ (the median, which a falling loss and some odd ones do not move).
Only finite losses are remembered.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import sub
from pathlib import Path
from typing import Any

from megacore.config.schema import GuardConfig
from megacore.data.files import write_atomic
from megacore.monitor.run_folder import SKIPPED

HOLES, BATCHES = "skipped_samples", "skipped_batches"
"""Keys of a ledger, in its file and in checkpoints."""
FEWEST = 16
"""Losses before which nothing is judged; of so many the median is what is usual."""
NORMAL = 1.4826 / math.sqrt(2)
"""The standard deviation of independent normal numbers, in units of the median of their neighbours' distances."""
QUIET = 0.005
"""Least deviation, as a share of the median: a loss that hardly moves makes no spike of a ripple."""


@dataclass(frozen=True)
class Spike:
    """A step whose loss jumped."""

    step: int
    loss: float
    usual: float
    sigmas: float

    @property
    def text(self) -> str:
        """For people."""
        jump = "is not finite" if not math.isfinite(self.loss) else f"lies {self.sigmas:.1f} deviations above it"
        return f"step {self.step}: loss {self.loss:.4f}, usually {self.usual:.4f}: it {jump}"


class SpikeGuard:
    """Judges each step's loss by those before; the same on all ranks, which see the same losses."""

    def __init__(self, guard: GuardConfig, state: Mapping[str, Any]) -> None:
        """``state`` is what a checkpoint kept of the run before, or nothing."""
        self.sigma = guard.spike_sigma
        self.losses: deque[float] = deque(state.get("losses", ()), maxlen=guard.spike_window)

    def state(self) -> dict[str, Any]:
        """For checkpoints, as JSON."""
        return {"losses": list(self.losses)}

    def see(self, step: int, loss: float) -> Spike | None:
        """Remember a loss; what it is, if it is a spike. (A run that skips steps with gradients that are not finite
        has losses that are not, either: these are no spikes, and not remembered.)"""
        if not math.isfinite(loss):
            return None
        spike = None
        if len(self.losses) >= FEWEST:
            losses = list(self.losses)
            usual = statistics.median(losses[-FEWEST:])
            deviation = NORMAL * statistics.median(list(map(abs, map(sub, losses[1:], losses))))
            sigmas = (loss - usual) / max(deviation, QUIET * abs(usual), 1e-12)
            spike = Spike(step, loss, usual, sigmas) if sigmas > self.sigma else None
        self.losses.append(loss)
        return spike


@dataclass(frozen=True)
class Ledger:
    """Samples that a run leaves out: runs of ordinals [first, last), which ``batches`` of it would have held."""

    holes: tuple[tuple[int, int], ...] = ()
    batches: int = 0

    @classmethod
    def of(cls, holes: Sequence[Sequence[int]], batches: int) -> "Ledger":
        """In order."""
        return cls(tuple(sorted({(int(first), int(last)) for first, last in holes})), int(batches))

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> "Ledger":
        """What a checkpoint's state says, or none."""
        return cls.of(state.get(HOLES, ()), state.get(BATCHES, 0))

    def state(self) -> dict[str, Any]:
        """For checkpoints and files, as JSON."""
        return {HOLES: [list(hole) for hole in self.holes], BATCHES: self.batches}

    @classmethod
    def read(cls, out: Path) -> "Ledger":
        """What the folder of a run says. Raises ValueError where the file is damaged."""
        path = out / SKIPPED
        if not path.exists():
            return cls()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls.of(found[HOLES], found[BATCHES])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} does not say which samples are left out ({type(error).__name__}: {error}); restore it, or "
                "remove it if none are"
            ) from None

    def write(self, out: Path) -> None:
        """For whoever goes on in this folder."""
        write_atomic(out / SKIPPED, (json.dumps(self.state()) + "\n").encode())

    def joined(self, other: "Ledger") -> "Ledger":
        """What either says."""
        return Ledger.of((*self.holes, *other.holes), max(self.batches, other.batches))

    def with_batch(self, ordinals: Sequence[int]) -> "Ledger":
        """One batch more, of ascending ordinals."""
        starts = [each for each, before in zip(ordinals, [None, *ordinals]) if before is None or each != before + 1]
        ends = [each + 1 for each, after in zip(ordinals, [*ordinals[1:], None]) if after is None or after != each + 1]
        return Ledger.of((*self.holes, *zip(starts, ends)), self.batches + 1)
