"""How a rank tells the command that started it how it ended: a file in a folder that only the two know.

An exit code says too little, and torch's agent takes every code but 0 for a fault that is to be mended by a restart. So
a rank that stops on request leaves 0 and a word. Imports no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from megacore.launch.failures import Failure

VARIABLE = "MEGACORE_ENDINGS"
"""Names the folder to the ranks."""
NODE = "MEGACORE_NODE"
"""The process that made it."""
STOPPED = "stopped"


class Endings:
    """Of one node's ranks, in one attempt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Endings | None":
        """Where this rank is to leave word; None if nobody asks for it. Raises ValueError where it cannot."""
        if not environ.get(VARIABLE):
            return None
        folder = Path(environ[VARIABLE])
        if not folder.is_dir() or not environ.get(NODE, "").isdecimal():
            raise ValueError(
                f"{VARIABLE}={folder} with {NODE}={environ.get(NODE, '')} are not a folder and a process; "
                "`megacore launch` sets both for its ranks: unset them"
            )
        return cls(folder)

    def stopped(self, rank: int) -> None:
        """A rank leaves because the run was asked to stop, and has saved."""
        (self.folder / f"{rank}.{STOPPED}").touch()

    def failed(self, failure: Failure) -> None:
        """A rank leaves because of a fault."""
        (self.folder / f"{failure.rank}.json").write_text(json.dumps(asdict(failure)))

    def any_stopped(self) -> bool:
        """Whether the run has stopped on request: its ranks do that together."""
        return any(self.folder.glob(f"*.{STOPPED}"))

    def failure(self, rank: int, exitcode: int) -> Failure:
        """A failed rank's own words, or what its exit code tells."""
        try:
            told = json.loads((self.folder / f"{rank}.json").read_text())
        except (OSError, ValueError):  # it died without a word, or while it wrote
            return Failure.of_exit(rank, exitcode)
        return Failure(**{**told, "frames": tuple(told["frames"])})

    def forget(self) -> None:
        """Another attempt begins."""
        for path in self.folder.iterdir():
            path.unlink()
