"""Programs that watch many runs: each gets the same figures through one small interface."""

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from megacore.monitor.metrics import StepMetrics
from megacore.monitor.run_folder import TENSORBOARD

TAGS = MappingProxyType(
    {
        "loss": "train/loss",
        "grad_norm": "train/grad_norm",
        "lr": "train/learning_rate",
        "val_loss": "validation/loss",
        "tokens_per_s": "throughput/tokens_per_sec",
        "step_time_s": "throughput/step_time_s",
        "tflops_per_device": "throughput/tflops_per_device",
        "mfu": "throughput/mfu",
        "memory_gb": "memory/peak_gb",
    }
)
"""Key of metrics.jsonl -> tag. Unknown values are not sent."""


class Tracker(Protocol):
    """Something that is told each logged step."""

    def log(self, metrics: StepMetrics) -> None:
        """Takes the figures of one step."""

    def text(self, tag: str, text: str, step: int) -> None:
        """Takes a text, such as a sample from the model or the run's configuration."""

    def close(self) -> None:
        """Writes out what is still held back."""


class TensorBoard:
    """Writes TensorBoard event files to out/tensorboard. Needs the `monitor` extra."""

    def __init__(self, out: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional
        except ImportError as error:
            raise ValueError(
                f'log.tensorboard=true needs the tensorboard package ({error}); run: pip install "megacore[monitor]", '
                "or set log.tensorboard=false"
            ) from error
        self._writer: Any = SummaryWriter(str(out / TENSORBOARD))

    def log(self, metrics: StepMetrics) -> None:
        """Sends every known figure under its tag of TAGS, at x = step; statistics under their own names."""
        for name, tag in TAGS.items():
            value = getattr(metrics, name)
            if value is not None:
                self._writer.add_scalar(tag, value, metrics.step)
        for name, figure in (metrics.statistics or {}).items():
            by_part = figure if isinstance(figure, dict) else {"": figure}
            for part, value in by_part.items():
                self._writer.add_scalar(f"statistics/{name}/{part}".rstrip("/"), value, metrics.step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Shows the text as it is: four spaces make it a code block of TensorBoard's markdown."""
        self._writer.add_text(tag, "\n".join("    " + line for line in text.splitlines()), step)

    def close(self) -> None:
        """Writes out what is still held back."""
        self._writer.close()


def open_trackers(out: Path, tensorboard: bool = False, wandb: bool = False) -> Sequence[Tracker]:
    """The trackers that `log.tensorboard` and `log.wandb` ask for (call it in one process of the run only)."""
    if wandb:
        raise ValueError("log.wandb=true is not built yet; use log.tensorboard=true")
    return [TensorBoard(out)] if tensorboard else []
