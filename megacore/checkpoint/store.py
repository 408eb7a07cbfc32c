"""Where checkpoints and exports lie: a folder of this machine, or one of an object store through fsspec.

Both keep one promise, on which `manifest.commit` rests: a file that `create` closed, or `replace` wrote, is whole and
durable, and `replace` gives a reader the old content or the new one. In a folder that is write, fsync and rename; an
object store shows an object only once it is whole.
"""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import Any

Notice = Callable[[str], None]
"""Told of each operation right before it happens: "write NAME", "fsync NAME", "rename NAME", "remove NAME"."""


def unnoticed(operation: str) -> None:
    """Nobody wants to know."""


class Sink(ABC):
    """A new file."""

    @abstractmethod
    def write(self, data: memoryview | bytes) -> None:
        """Append all of it."""

    @abstractmethod
    def close(self) -> None:
        """Make it whole and durable."""

    @abstractmethod
    def abandon(self) -> None:
        """Leave it; what was written may stay behind."""


class Store(ABC):
    """Files by plain names, and folders of more of them."""

    @abstractmethod
    def describe(self) -> str:
        """Its path or URL."""

    @abstractmethod
    def child(self, name: str) -> "Store":
        """The folder ``name`` in this one, which need not exist."""

    @abstractmethod
    def names(self) -> list[str]:
        """Its files, sorted; none where there is no such folder."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Its folders, sorted."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""

    @abstractmethod
    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill a buffer from ``offset`` on. Raises ValueError where the file ends before, OSError as usual."""

    @abstractmethod
    def create(self, name: str) -> Sink:
        """Begin a file; one of that name is overwritten."""

    @abstractmethod
    def replace(self, name: str, data: bytes) -> None:
        """Write a small file: it has its old content or the new one, whatever happens."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def remove_all(self, first: str = "") -> None:
        """Remove the folder and all that it holds, its file ``first`` before all others."""

    @abstractmethod
    def move_folder(self, name: str, target: str) -> None:
        """Move the folder ``name`` to ``target``, both relative to this one."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Space left, if that is known."""

    def read(self, name: str) -> bytes:
        """A whole file."""
        data = bytearray(self.size(name))
        self.read_into(name, 0, memoryview(data))
        return bytes(data)


class LocalStore(Store):
    """A folder. Symbolic links to files are not followed: they may lead anywhere."""

    def __init__(self, folder: Path, notice: Notice = unnoticed) -> None:
        self.folder, self.notice = folder, notice

    def describe(self) -> str:
        return str(self.folder)

    def child(self, name: str) -> "LocalStore":
        return LocalStore(self.folder / name, self.notice)

    def names(self) -> list[str]:
        return self._list(os.DirEntry.is_file)

    def folders(self) -> list[str]:
        return self._list(os.DirEntry.is_dir)

    def _list(self, kind: Callable[[Any], bool]) -> list[str]:
        try:
            with os.scandir(self.folder) as entries:
                return sorted(entry.name for entry in entries if kind(entry))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, name: str) -> int:
        return os.stat(self.folder / name, follow_symlinks=False).st_size

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        path = self.folder / name
        if path.is_symlink():
            raise ValueError(f"{path} is a symbolic link, which a checkpoint never holds; put the file itself there")
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    raise ValueError(f"{path} ends at byte {offset + done}, before {offset + len(buffer)}: truncated")
                done += count

    def create(self, name: str) -> "LocalSink":
        self.folder.mkdir(parents=True, exist_ok=True)
        return LocalSink(self.folder / name, self.notice)

    def replace(self, name: str, data: bytes) -> None:
        part = f".{name}.part"
        sink = self.create(part)
        sink.write(data)
        sink.close()
        self.sync()  # what the file speaks of is there before it is
        self.notice(f"rename {name}")
        os.replace(self.folder / part, self.folder / name)
        self.sync()

    def sync(self) -> None:
        """Make the folder's list of files durable, and its own place in its parent's."""
        for folder in (self.folder, self.folder.parent):
            self.notice(f"fsync {folder.name}/")
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def remove(self, name: str) -> None:
        self.notice(f"remove {name}")
        with suppress(FileNotFoundError):
            (self.folder / name).unlink()

    def remove_all(self, first: str = "") -> None:
        if self.folder.is_symlink():  # what it leads to belongs to somebody else
            self.notice(f"remove {self.folder.name}")
            self.folder.unlink()
            return
        if first:
            self.remove(first)
        self.notice(f"remove {self.folder.name}/")
        shutil.rmtree(self.folder, ignore_errors=True)

    def move_folder(self, name: str, target: str) -> None:
        goal = self.folder / target
        goal.parent.mkdir(parents=True, exist_ok=True)
        self.notice(f"rename {name}/")
        os.rename(self.folder / name, goal)

    def free_bytes(self) -> int | None:
        folder = self.folder
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free


SYNC_BYTES = 1 << 24
"""After so many bytes the disk is told to begin: else it would idle until the file is closed."""


class LocalSink(Sink):
    """A file of a folder, written without a buffer, while a thread brings to the disk what has been written."""

    def __init__(self, path: Path, notice: Notice) -> None:
        self.path, self.notice = path, notice
        self.unsynced = 0
        self.syncing: Thread | None = None
        self.problem: OSError | None = None
        # a link would have something overwritten that lies elsewhere
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        self.file = os.fdopen(handle, "wb", buffering=0)

    def write(self, data: memoryview | bytes) -> None:
        self.notice(f"write {self.path.name}")
        rest = memoryview(data)
        while rest:
            rest = rest[self.file.write(rest) :]
        self.unsynced += len(data)
        if self.unsynced >= SYNC_BYTES and (self.syncing is None or not self.syncing.is_alive()):
            self.unsynced = 0
            self.syncing = Thread(target=self._sync, name="write-back")
            self.syncing.start()

    def close(self) -> None:
        self.notice(f"fsync {self.path.name}")
        self._settle()
        if self.problem is not None:
            raise self.problem
        os.fsync(self.file.fileno())
        self.file.close()

    def abandon(self) -> None:
        self._settle()
        self.file.close()

    def _sync(self) -> None:
        try:
            getattr(os, "fdatasync", os.fsync)(self.file.fileno())
        except OSError as error:  # the kernel tells of it once: `close` must
            self.problem = error

    def _settle(self) -> None:
        if self.syncing is not None:
            self.syncing.join()


class RemoteStore(Store):
    """A folder of any file system that fsspec knows, such as s3://bucket/runs/a."""

    def __init__(self, system: Any, folder: str, notice: Notice = unnoticed) -> None:
        self.system, self.folder, self.notice = system, folder, notice

    def describe(self) -> str:
        return self.system.unstrip_protocol(self.folder)

    def child(self, name: str) -> "RemoteStore":
        return RemoteStore(self.system, self._path(name), self.notice)

    def _path(self, name: str) -> str:
        return f"{self.folder.rstrip('/')}/{name}"

    def names(self) -> list[str]:
        return self._list("file")

    def folders(self) -> list[str]:
        return self._list("directory")

    def _list(self, kind: str) -> list[str]:
        self.system.invalidate_cache()  # others write here, too
        try:
            entries: Sequence[dict[str, Any]] = self.system.ls(self.folder, detail=True)
        except FileNotFoundError:
            return []
        return sorted(PurePosixPath(entry["name"].rstrip("/")).name for entry in entries if entry["type"] == kind)

    def size(self, name: str) -> int:
        return int(self.system.size(self._path(name)))

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        data = self.system.cat_file(self._path(name), start=offset, end=offset + len(buffer))
        if len(data) < len(buffer):
            end = offset + len(data)
            raise ValueError(f"{self._path(name)} ends at byte {end}, before {offset + len(buffer)}: truncated")
        buffer[:] = data

    def create(self, name: str) -> "RemoteSink":
        self.system.makedirs(self.folder, exist_ok=True)
        return RemoteSink(self.system.open(self._path(name), "wb"), name, self.notice)

    def replace(self, name: str, data: bytes) -> None:
        self.system.makedirs(self.folder, exist_ok=True)
        self.notice(f"write {name}")
        self.system.pipe_file(self._path(name), data)

    def remove(self, name: str) -> None:
        self.notice(f"remove {name}")
        with suppress(FileNotFoundError):
            self.system.rm_file(self._path(name))

    def remove_all(self, first: str = "") -> None:
        if first:
            self.remove(first)
        self.notice(f"remove {PurePosixPath(self.folder).name}/")
        with suppress(FileNotFoundError):
            self.system.rm(self.folder, recursive=True)

    def move_folder(self, name: str, target: str) -> None:
        self.notice(f"rename {name}/")
        self.system.makedirs(self._path(target), exist_ok=True)
        for each in self.child(name).names():  # all is there before anything goes
            self.system.cp_file(self._path(f"{name}/{each}"), self._path(f"{target}/{each}"))
        self.child(name).remove_all()

    def free_bytes(self) -> int | None:
        return None


class RemoteSink(Sink):
    """An object, which appears when it is closed."""

    def __init__(self, file: Any, name: str, notice: Notice) -> None:
        self.file, self.name, self.notice = file, name, notice

    def write(self, data: memoryview | bytes) -> None:
        self.notice(f"write {self.name}")
        self.file.write(data)

    def close(self) -> None:
        self.notice(f"fsync {self.name}")
        self.file.close()

    def abandon(self) -> None:
        with suppress(Exception):  # a library's own way of saying that there is nothing to discard
            self.file.discard()


def open_store(path: str, notice: Notice = unnoticed) -> Store:
    """The store at a path of this machine or a URL.

    Raises ValueError for a URL whose file system cannot be had here.
    """
    protocol, separator, _ = path.partition("://")
    if not separator or protocol == "file":
        return LocalStore(Path(path.removeprefix("file://")), notice)
    try:
        import fsspec
    except ImportError:
        raise ValueError(f"{path} needs the package fsspec; pip install 'megacore[remote]', or give a folder") from None
    try:
        system, folder = fsspec.url_to_fs(path)
    except (ImportError, ValueError) as reason:
        raise ValueError(f"{path} cannot be opened: {reason}; install what it names, or give a folder") from reason
    return RemoteStore(system, folder, notice)
