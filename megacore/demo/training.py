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
    shop.console.line(shop.console.paint(f"$ {launcher.command} train {shop.run_file}", "bold"))
    code = launcher.train([str(shop.run_file)])
    if code == 0:
        shop.stamps.done("training", inputs)
    return code


def _finished(out: Path) -> bool:
    """Whether the run in the folder came to its end."""
    path = out / EVENTS
    return path.exists() and any(event["event"] == "finish" for event in read_json_lines(path))
