"""Stage 4: `megacore train` on the run file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megacore.demo.workshop import Workshop
from megacore.monitor.jsonl import read_json_lines
from megacore.monitor.run_folder import EVENTS, METRICS


@dataclass(frozen=True)
class Launcher:
    """How training is started: processes are the faces' business."""

    train: Callable[[list[str]], int]
    """`megacore train`: arguments -> exit code."""
    command: str
    """How the user calls megacore from here."""


def train(shop: Workshop, launcher: Launcher) -> int:
    """Train, unless this very run came to its end already; returns the exit code."""
    shop.title("4 · Training")
    inputs = [shop.stamps.made["dataset"], shop.run_file.read_text(encoding="utf-8")]
    if _finished(shop.out) and shop.unchanged("training", inputs, shop.out / METRICS):
        shop.console.line("  this very model is trained already: its results follow; --fresh makes everything anew")
        return 0
    words = [str(shop.run_file)]
    if shop.stamps.current("training begun", inputs) and not _finished(shop.out):
        shop.console.line("  this very model was being trained: it goes on from its last checkpoint")
    else:
        words.append("checkpoint.resume=never")
    shop.stamps.done("training begun", inputs)
    shop.console.line(shop.console.paint(f"$ {launcher.command} train {' '.join(words)}", "bold"))
    code = launcher.train(words)
    if code == 0:
        shop.stamps.done("training", inputs)
    return code


def _finished(out: Path) -> bool:
    """Whether the run in the folder came to its end."""
    path = out / EVENTS
    return path.exists() and any(event["event"] == "finish" for event in read_json_lines(path))
