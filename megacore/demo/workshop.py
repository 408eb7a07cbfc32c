"""What all stages work with: the user's choices, the folder, the screen, and stamps of what is made already."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megacore.data.stamps import Stamps
from megacore.monitor.console import Console, Phases


@dataclass(frozen=True)
class Options:
    """What the user chose."""

    out: Path
    text: Sequence[str] = ()
    """Files and folders to learn from; empty: what comes with Python."""
    steps: int | None = None
    vocab_size: int | None = None
    """None: by the text's size."""
    fast: bool = False
    fresh: bool = False


class Workshop:
    """Where stages leave their results and say what they do."""

    def __init__(self, options: Options, console: Console) -> None:
        self.options, self.console, self.out = options, console, options.out
        self.run_file = self.out / "run.toml"  # what `megacore train` takes to do the training again
        self.phases = Phases()
        self.out.mkdir(parents=True, exist_ok=True)
        self.stamps = Stamps(self.out / "demo.json", options.fresh)

    def title(self, text: str) -> None:
        """The line above a stage."""
        self.console.line()
        self.console.rule(text)

    def result(self, what: str, path: Path) -> None:
        """What a stage has made, and where it lies."""
        self.console.line(f"  {what}  {self.console.paint(f'→ {path}', 'green')}")

    def passing(self, text: str) -> None:
        """A line that the next one replaces; terminals only."""
        self.console.progress(f"  {text}")

    def unchanged(self, stage: str, inputs: object, *results: Path) -> bool:
        """Whether a stage need not be done again, and says so; else its stamp is taken away until it is done."""
        if self.stamps.current(stage, inputs, *results):
            self.console.line(f"  {self.console.paint('unchanged since last time, used again', 'dim')}")
            return True
        self.stamps.begin(stage)
        return False
