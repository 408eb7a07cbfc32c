"""Writing files so that a reader meets either the old content or the new, never a half of it."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SAMPLED_BLOCKS = 16
BLOCK_BYTES = 1 << 14


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut (a file system without this call is left as it is)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # Windows and some network file systems do not open folders
    try:
        os.fsync(handle)
    except OSError:
        return  # the same file systems may open a folder and still refuse to sync it
    finally:
        os.close(handle)


def replace_file(temporary: Path, final: Path) -> None:
    """Put a finished temporary file in its place, on disk before its name is."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a small file whole: temporary file, sync, rename."""
    with scratch_folder(path) as folder:
        temporary = folder / path.name
        temporary.write_bytes(content)
        replace_file(temporary, path)
    sync_folder(path.parent)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` (the same file system, so that renames are atomic), removed afterwards.

    Raises:
        ValueError: the folder of `target` does not exist or is not writable.
    """
    try:
        folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.writing-")
    except OSError as reason:
        fix = "make it, or name another place"
        raise ValueError(f"cannot write {target}: folder {target.parent}: {reason.strerror}; {fix}") from reason
    with folder as name:
        yield Path(name)


def sampled_digest(path: Path) -> bytes:
    """16 bytes: a hash of a file's size and of 16 blocks of 16 KiB spread evenly over it (up to 256 KiB: all)."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        if size <= SAMPLED_BLOCKS * BLOCK_BYTES:
            digest.update(file.read())
        else:
            for block in range(SAMPLED_BLOCKS):
                file.seek((size - BLOCK_BYTES) * block // (SAMPLED_BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.digest()
