"""Tensors that live in files: what an optimizer remembers, on an NVMe disk instead of in memory.

As ZeRO-Infinity does (Rajbhandari et al. 2021, section 5.1.1), state is processed bucket by bucket: while one bucket is
updated the next is read and the last is written back, so that two or three buckets are in memory, whatever the size
of the model. Files are mapped into memory and the kernel's page cache moves the data: rules see ordinary tensors.

The files have no names: they vanish with the process, however it ends, and what must survive is in checkpoints.
"""

import errno
import mmap
import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

AHEAD = 2
"""Buckets whose write-back may be under way when another is begun: more are waited for, so that memory is bounded."""


def unavailable() -> str:
    """Why this system cannot do it, or ''."""
    wanted = ((mmap, "MADV_WILLNEED"), (mmap, "MADV_DONTNEED"), (os, "posix_fallocate"), (os, "posix_fadvise"))
    missing = [name for module, name in wanted if not hasattr(module, name)]
    return f"this system has no {', '.join(missing)}" if missing else ""


class MappedMemory:
    """Zeros in files of ``folder``, bucket by bucket. Raises ValueError where the folder cannot hold them."""

    def __init__(self, folder: Path, num_buckets: int) -> None:
        self.folder = folder
        self.files: list[list[_File]] = [[] for _ in range(num_buckets)]
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="write-back")
        self.written: list[Future[None]] = []

    def zeros(self, bucket: int, numel: int, dtype: torch.dtype) -> Tensor:
        """[numel] of a bucket's state, from now on in a file."""
        if numel == 0:
            return torch.zeros(0, dtype=dtype)
        file = _File(self.folder, numel * dtype.itemsize)
        self.files[bucket].append(file)
        return torch.frombuffer(file.map, dtype=dtype)

    def fetch(self, bucket: int) -> None:
        """Begin to read a bucket; does not wait."""
        if bucket < len(self.files):
            for file in self.files[bucket]:
                file.map.madvise(mmap.MADV_WILLNEED)

    def release(self, bucket: int) -> None:
        """Give a bucket's memory back and begin to write what was changed; waits for an earlier one at most."""
        for file in self.files[bucket]:
            file.map.madvise(
                mmap.MADV_DONTNEED
            )  # of a shared mapping: the pages stay in the kernel's cache until written
        self.written.append(self.writer.submit(self._write_back, bucket))
        while len(self.written) > AHEAD:
            self.written.pop(0).result()

    def _write_back(self, bucket: int) -> None:
        for file in self.files[bucket]:
            file.write_back()


class _File:
    """A file without a name, its space reserved, mapped into memory."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=folder)
            # Without its blocks reserved, a full disk would show as a bus error in the middle of a step.
            os.posix_fallocate(self.file.fileno(), 0, num_bytes)
        except OSError as reason:
            full = reason.errno == errno.ENOSPC
            raise ValueError(
                f"optim.offload_folder={folder} cannot hold {num_bytes} more bytes of state: {reason.strerror}; "
                f"{'free space there' if full else 'make it writable'} or name another folder"
            ) from reason
        self.map = mmap.mmap(self.file.fileno(), num_bytes)

    def write_back(self) -> None:
        """Write what was changed, then let the kernel forget the pages."""
        os.fdatasync(self.file.fileno())
        os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
