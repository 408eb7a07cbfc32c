"""Built indices on disk: found by what they were built from, built once however many processes ask.

The name of an entry is a hash over everything that its content depends on, the fingerprint of the data included: data
that changed simply has no entry yet. An entry is a folder of `.npy` files that appears by one rename, so it is either
whole or absent. Nothing is forced to disk, which would cost more than building does; so after a power cut a file may
be hollow, and samples of each are compared with the manifest before it is used. A lock keeps other builders waiting;
the kernel frees it when a builder dies, and whoever comes next clears away what the dead one left.
"""

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacore.data.files import sampled_digest

Arrays = dict[str, NDArray[Any]]
Notify = Callable[[str], object]
FORMAT = 2  # of the entries; part of every key
MANIFEST = "manifest.json"


class IndexCache:
    """A folder of built indices.

    Args:
        folder: made when first needed.
        notify: told in words when the folder cannot be used (the index is then built in memory).
    """

    def __init__(self, folder: str | Path, notify: Notify) -> None:
        self.folder, self.notify = Path(folder), notify

    def get(self, key: dict[str, Any], build: Callable[[], Arrays]) -> Arrays:
        """The arrays that belong to `key`: mapped from disk if they are there, else built and stored.

        Args:
            key: JSON-able facts that determine the content.
            build: makes the arrays; called by one process at a time.
        """
        text = json.dumps({"format": FORMAT, **key}, sort_keys=True, indent=1)
        entry = self.folder / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        found = _load(entry)
        if found is not None:
            return found
        with ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                alone = stack.enter_context(_locked(self.folder / ".lock"))
            except OSError as reason:
                self._complain(reason)
                return build()
            found = _load(entry)  # another process may have built it while this one waited
            if found is not None:
                return found
            arrays = build()
            try:
                self._store(entry, text, arrays, alone)
            except OSError as reason:
                self._complain(reason)
            return _load(entry) or arrays

    def _complain(self, reason: OSError) -> None:
        why = f"sample indices cannot be kept in {self.folder} ({reason.strerror})"
        self.notify(f"{why}: every process builds them in memory; set data.cache to a folder that can be written")

    def _store(self, entry: Path, text: str, arrays: Arrays, alone: bool) -> None:
        """Write an entry.

        Args:
            alone: the lock is held, so whatever another builder began belongs to a dead one.
        """
        if alone:
            for left in self.folder.glob("*.building-*"):
                shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=f"{entry.name}.building-"))
        try:
            temporary.chmod(0o755)  # mkdtemp makes it ours alone; a cache is for everybody who may read the data
            for name, array in arrays.items():
                np.save(temporary / f"{name}.npy", array, allow_pickle=False)
            digests = {name: sampled_digest(temporary / f"{name}.npy").hex() for name in sorted(arrays)}
            manifest = {"key": json.loads(text), "arrays": digests}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
            if entry.exists() and _load(entry) is None:
                shutil.rmtree(entry)  # damaged
            temporary.rename(entry)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _load(entry: Path) -> Arrays | None:
    """The arrays of an entry, mapped read-only; None where it is absent or damaged."""
    try:
        arrays = {}
        for name, digest in json.loads((entry / MANIFEST).read_text("utf-8"))["arrays"].items():
            path = entry / f"{name}.npy"
            if sampled_digest(path).hex() != digest:
                return None
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        return arrays
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Wait for an exclusive lock on a file and hold it; yields whether the file system gave one.

    Without locks two builders may do the same work; each entry still appears whole.
    """
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            held = True
        except OSError:
            held = False
        yield held  # closing the file frees the lock
