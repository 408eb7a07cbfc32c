"""How much of a run's time went into training that counts, over all its starts.

"Goodput" as Google's ML Goodput measurement defines it: the time of steps that were kept, as a share of the time from
the first start on. What was trained after a checkpoint and lost with a fault has to be made again, and counts once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacore.monitor.console import human_time
from megacore.monitor.jsonl import read_json_lines
from megacore.monitor.run_folder import EVENTS, METRICS

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Goodput:
    """Seconds from the beginning of the first start to the last event, and what they went into."""

    wall_s: float
    training_s: float
    """Steps that were kept."""
    startup_s: float
    num_starts: int

    @property
    def share(self) -> float:
        """0 to 1."""
        return self.training_s / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def rest_s(self) -> float:
        """Evaluation, waiting for saves, steps that were made again, and time between an end and the next start."""
        return max(0.0, self.wall_s - self.training_s - self.startup_s)

    def line(self) -> str:
        """For people."""
        starts = f"{self.num_starts} starts" if self.num_starts > 1 else "start-up"
        rest = f"evaluation, saves and what was lost {self._percent(self.rest_s)}"
        whole = f"{self.share:.1%} of {human_time(self.wall_s)} in steps that count"
        return f"{whole}; {starts} {self._percent(self.startup_s)}, {rest}"

    def as_json(self) -> dict[str, float]:
        """For events.jsonl and reports."""
        return {
            "goodput": self.share,
            "wall_s": self.wall_s,
            "training_s": self.training_s,
            "startup_s": self.startup_s,
            "rest_s": self.rest_s,
            "starts": self.num_starts,
        }

    def _percent(self, seconds: float) -> str:
        return f"{seconds / self.wall_s:.1%}" if self.wall_s > 0 else "0.0%"


def goodput_of(out: Path, now: float | None = None) -> Goodput | None:
    """Of a run's folder, until its last event or ``now``; None where nothing has started."""
    if not (out / EVENTS).exists() or not (out / METRICS).exists():
        return None
    return goodput(read_json_lines(out / EVENTS), read_json_lines(out / METRICS), now)


def goodput(events: Records, metrics: Records, now: float | None = None) -> Goodput | None:
    """From the lines of events.jsonl and metrics.jsonl; of a run that was resumed the latter has each step once."""
    starts = [event for event in events if event["event"] == "start"]
    if not starts:
        return None
    startups = [sum(start.get("startup_s", {}).values()) for start in starts]
    began = starts[0]["time"] - startups[0]
    ended = events[-1]["time"] if now is None else now
    training, before = 0.0, 0
    for record in metrics:
        # a line's step time is the mean of all steps since the one before it
        training += (record.get("step_time_s") or 0.0) * (record["step"] - before)
        before = record["step"]
    return Goodput(ended - began, min(training, ended - began), sum(startups), len(starts))
