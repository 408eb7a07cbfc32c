"""What a run leaves in its folder, and how an earlier run there is put aside instead of overwritten."""

from pathlib import Path

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
LOG = "log.txt"
CONFIG = "config.toml"
CURVE = "loss.png"
TIMELINE = "timeline.json"
TIMELINE_PICTURE = "timeline.svg"
TENSORBOARD = "tensorboard"
PROFILE = "profile"
COMMUNICATION = "communication"
PREVIOUS = "previous"
SKIPPED = "skipped.json"
TRACKERS = "trackers.json"
"""The run's ids in trackers that know many runs."""
WANDB = "wandb"
PROMETHEUS = "metrics.prom"
REPORT = "report.html"
STOP, SAVE, PROFILE_NOW = "STOP", "SAVE", "PROFILE"
"""Files that a person or a script makes in the folder of a run that is going on: it saves and stops, or saves, or
profiles its next steps."""

RUN_FILES = (
    *(METRICS, EVENTS, LOG, CONFIG, TIMELINE, TENSORBOARD, PROFILE, COMMUNICATION, SKIPPED),
    *(TRACKERS, WANDB, PROMETHEUS, REPORT),
)
PICTURES = ("*.png", "*.svg")


def archive_previous_run(out: Path) -> Path | None:
    """Moves an earlier run's files in `out` to `out/previous/N` (N counts up from 1) and returns that folder.

    Metrics, events, logs, resolved config, TensorBoard events, profiles and pictures move; checkpoints, exports, data
    and everything else stay. Nothing is deleted. Returns None if there is nothing to move.
    """
    found = [out / name for name in RUN_FILES if (out / name).exists()]
    found += [picture for pattern in PICTURES for picture in sorted(out.glob(pattern))]
    if not found:
        return None
    target = _next_folder(out / PREVIOUS)
    for path in found:
        path.rename(target / path.name)
    return target


def _next_folder(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = max((int(entry.name) for entry in parent.iterdir() if entry.name.isdigit()), default=0) + 1
    while True:  # mkdir is the lock: of two runs that start at once, one gets the next number
        try:
            (parent / str(number)).mkdir()
            return parent / str(number)
        except FileExistsError:
            number += 1
