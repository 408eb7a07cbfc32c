"""Exports of a run to Hugging Face folders while it trains: a thread reads the checkpoint that was just saved."""

from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from megacore.checkpoint.find import folder_of
from megacore.checkpoint.hf.export import export
from megacore.checkpoint.read import Checkpoint
from megacore.checkpoint.retain import Retention
from megacore.checkpoint.store import Store


@dataclass(frozen=True)
class Exported:
    """What became of an export; ``problem`` is '' or why there is none."""

    step: int
    folder: str
    problem: str = ""


class Exporter:
    """Writes out/hf/step-N of checkpoints in ``store``, which stay until they have been read."""

    def __init__(self, store: Store, target: Path, dtype: str, retention: Retention) -> None:
        self.store, self.target, self.dtype, self.retention = store, target, dtype, retention
        self.thread: Thread | None = None
        self.result: Exported | None = None

    def start(self, step: int) -> None:
        """Begin to export a checkpoint; the result of the one before must have been taken."""
        assert self.thread is None, "an export is under way"
        self.retention.held = frozenset({step})
        self.thread = Thread(target=self._work, args=(step,), name="export")
        self.thread.start()

    def take(self, wait: bool = False) -> Exported | None:
        """What became of the export that was begun, once; None if it goes on, or if there was none."""
        if self.thread is None:
            return None
        if wait:
            self.thread.join()
        if self.thread.is_alive():
            return None
        self.thread = None
        self.retention.held = frozenset()
        return self.result

    def _work(self, step: int) -> None:
        folder, problem = self.target / folder_of(step), ""
        try:
            export(Checkpoint.of(self.store.child(folder_of(step))), str(folder), dtype=self.dtype, force=True)
        except Exception as error:  # training goes on, and says what happened
            problem = f"{type(error).__name__}: {error}"
        self.result = Exported(step, str(folder), problem)
