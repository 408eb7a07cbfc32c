"""A folder that appears whole or not at all."""

import os
import re
from pathlib import Path

from megacore.checkpoint.hf.files import CONFIG, GENERATION, INDEX, TOKENIZER_FILES
from megacore.checkpoint.store import LocalStore, Store, open_store

OURS = re.compile(
    "|".join(map(re.escape, (CONFIG, GENERATION, INDEX, *TOKENIZER_FILES))) + r"|model(-\d+-of-\d+)?\.safetensors"
)
"""What an export consists of, and so may replace."""


class Destination:
    """Where an HF folder is going to be. Its files are written to ``work``, and put in place by `finish`.

    On this machine ``work`` is a hidden folder beside it. In an object store it is the folder itself, which counts for
    nothing until its config.json is there.
    """

    def __init__(self, folder: str, force: bool) -> None:
        """Raises ValueError for a folder that is not empty, unless ``force``: then what an export consists of is
        replaced, and all else stays."""
        self.store: Store = open_store(folder)
        self.is_local = isinstance(self.store, LocalStore)
        present = [*self.store.names(), *self.store.folders()]
        if present and not force:
            raise ValueError(f"{folder} is not empty ({present[0]}, ...); name another folder, or use --force")
        if isinstance(self.store, LocalStore):
            self.path = Path(os.path.abspath(self.store.folder))
            if self.path.exists() and not self.path.is_dir():
                raise ValueError(f"{folder} is a file; name a folder")
            self.work = str(self.path.with_name(f".{self.path.name}.writing"))
            open_store(self.work).remove_all()  # of an export that was killed
        else:
            self.work = folder
            self._clear()

    def finish(self, weights: list[str], last: dict[str, bytes]) -> None:
        """Put everything in place; the last of ``last``, config.json, makes it an HF folder."""
        assert list(last)[-1] == CONFIG, list(last)
        work = open_store(self.work)
        for name, data in last.items():
            work.replace(name, data)
        if not self.is_local:
            return
        if not [*self.store.names(), *self.store.folders()]:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.work, self.path)
            _sync(self.path.parent)
            return
        self._clear()
        for name in [*weights, *last]:
            os.replace(Path(self.work) / name, self.path / name)
        work.remove_all()
        _sync(self.path)

    def _clear(self) -> None:
        """Remove an older export, first what makes it one."""
        names = [name for name in self.store.names() if OURS.fullmatch(name)]
        for name in sorted(names, key=lambda name: name != CONFIG):
            self.store.remove(name)


def _sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
