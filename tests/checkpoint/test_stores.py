"""Object stores through fsspec: the same promises as folders, whole runs of one process and of several ranks."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megacore.checkpoint import store as store_module
from megacore.checkpoint.find import LATEST, folder_of, newest, steps_in
from megacore.checkpoint.read import Checkpoint
from megacore.checkpoint.retain import Retention
from megacore.checkpoint.store import LocalStore, RemoteStore, Store, open_store
from megacore.train.state import State
from tests.checkpoint.common import config_of, digests, facts_of, load, save, saver_of, steps
from tests.engine.common import built_rank
from tests.pool import WorkerPool

fsspec = pytest.importorskip("fsspec")

TINY = ("model.vocab_size=67", "model.num_layers=1", "optim.name=lion")
"""Few slices, so few operations."""
ALONE = config_of(TINY, {"dp": 1})
TWO = config_of(TINY, {"tp": 2})
MEMORY = "memory://megacore-tests/run"


class Dead(BaseException):
    """A process that is no more: nothing it would do afterwards happens."""


def dying(place: int, seen: list[str]) -> Callable[[str], None]:
    """A notice after whose operation number ``place`` none happens."""

    def notice(operation: str) -> None:
        seen.append(operation)
        if len(seen) > place >= 0:
            raise Dead

    return notice


@pytest.fixture
def memory() -> Iterator[str]:
    yield MEMORY
    system = fsspec.filesystem("memory")
    if system.exists("/megacore-tests"):
        system.rm("/megacore-tests", recursive=True)


def remote(path: Path) -> str:
    """A folder of this machine as fsspec has it."""
    return f"local://{path}"


def test_which_store_is_whose(tmp_path: Path) -> None:
    assert isinstance(open_store(str(tmp_path)), LocalStore)
    assert isinstance(open_store(f"file://{tmp_path}"), LocalStore)
    assert isinstance(open_store(remote(tmp_path)), RemoteStore)
    assert isinstance(open_store(MEMORY), RemoteStore)
    with pytest.raises(ValueError, match=r"nonsense://a cannot be opened: .*; install what it names, or give a folder"):
        open_store("nonsense://a")


@pytest.mark.parametrize("kind", ["local", "remote", "memory"])
def test_every_store_does_the_same(kind: str, tmp_path: Path, memory: str) -> None:
    path = {"local": str(tmp_path / "a"), "remote": remote(tmp_path / "a"), "memory": memory}[kind]
    store = open_store(path)
    assert store.names() == store.folders() == []
    store.remove("nothing")
    store.child("nothing").remove_all()
    sink = store.child("b").create("data")
    for part in (b"some", memoryview(b""), memoryview(b"thing")):
        sink.write(part)
    sink.close()
    store.replace("small", b"old")
    store.replace("small", b"new")
    assert (store.names(), store.folders(), store.child("b").names()) == (["small"], ["b"], ["data"])
    assert (store.read("small"), store.child("b").read("data"), store.child("b").size("data")) == (
        b"new",
        b"something",
        9,
    )
    buffer = bytearray(5)
    store.child("b").read_into("data", 4, memoryview(buffer))
    assert bytes(buffer) == b"thing"
    with pytest.raises(ValueError, match="data ends at byte 9, before 10: truncated"):
        store.child("b").read_into("data", 5, memoryview(buffer))
    for absent in (store.size, store.read):
        with pytest.raises(FileNotFoundError):
            absent("nothing")
    store.child("b").replace("more", b"1")
    store.move_folder("b", "c/d")
    assert store.folders() == ["c"]
    assert store.child("c").child("d").read("data") == b"something"
    store.child("c").child("d").remove_all(first="data")
    assert store.child("c").child("d").names() == []


@pytest.mark.parametrize("first_step", [0, 1], ids=["first save", "second save"])
def test_killed_at_every_operation(memory: str, first_step: int) -> None:
    """An object store has no half objects: what matters is their order."""
    built = built_rank(0, 1, ALONE)
    steps(built, 1, 1)
    found = []
    for place in range(100):
        whole = open_store(memory)
        whole.remove_all()
        if first_step:
            assert save(built, saver_of(built, memory), first_step).problem == ""
        seen: list[str] = []
        saver = saver_of(built, memory, retention=Retention(1), notice=dying(place, seen))
        is_dead = False
        try:
            outcome = save(built, saver, first_step + 1)
            assert outcome.problem == outcome.remark == ""
        except Dead:
            is_dead = True
        found.append(newest_step(whole))
        assert save(built, saver_of(built, memory, retention=Retention(1)), first_step + 2).problem == ""
        assert [(step, done) for step, _, done in steps_in(whole)] == [(first_step + 2, True)]
        if not is_dead:
            break
    assert not is_dead and len(found) > 15
    assert found == sorted(found) and set(found) == {first_step, first_step + 1}


def newest_step(store: Store) -> int:
    """Of the newest whole checkpoint, of which every byte is read; 0 if there is none."""
    try:
        checkpoint = Checkpoint.of(newest(store))
    except ValueError as reason:
        assert "holds no whole checkpoint" in str(reason) or "there is nothing at" in str(reason)
        return 0
    checkpoint.verify()
    return checkpoint.manifest.step


def test_a_move_loses_nothing(memory: str) -> None:
    """Killed at any moment, the checkpoint is whole where it was or where it goes."""
    built = built_rank(0, 1, ALONE)
    for place in range(10):
        store = open_store(memory)
        store.remove_all()
        assert save(built, saver_of(built, memory), 1).problem == ""
        try:
            open_store(memory, dying(place, [])).move_folder(folder_of(1), f"aside/{folder_of(1)}")
        except Dead:
            assert max(newest_step(store), newest_step(store.child("aside"))) == 1
        else:
            assert (newest_step(store), newest_step(store.child("aside"))) == (0, 1)
            return
    raise AssertionError("a move does not end")


def remote_of_rank(rank: int, folder: str) -> list[str]:
    """Two saves, one in the background, and a load; what each save took away."""
    built = built_rank(rank, 2, TWO)
    saver = saver_of(built, folder, in_background=True, retention=Retention(1))
    removed: list[str] = []
    for step in (1, 2):
        steps(built, step, step)
        saver.start(facts_of(built, step))
        outcome = saver.take(wait=True)
        assert outcome is not None and outcome.problem == outcome.remark == "", outcome
        removed += outcome.removed
    load(State(built), folder, 2)
    return removed


def test_several_ranks_write_to_a_remote_store(pool: WorkerPool, tmp_path: Path) -> None:
    far, near = remote(tmp_path / "far"), tmp_path / "near"
    removed = pool.run(remote_of_rank, 2, far)
    assert removed[0] == removed[1] and len(removed[0]) == 1 and removed[0][0].endswith(folder_of(1))
    store = open_store(far)
    assert store.folders() == [folder_of(2)] and store.read(LATEST) == f"{folder_of(2)}\n".encode()
    Checkpoint.open(far).verify()
    shutil.copytree(tmp_path / "far", near)
    assert digests(far, 2) == digests(str(near), 2)


def test_an_error_of_the_disk_while_a_file_is_written_is_told_when_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of such an error once, here to the thread that writes back."""

    def broken(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(store_module, "SYNC_BYTES", 16)
    sink = LocalStore(tmp_path).create("whole")
    for _ in range(5):
        sink.write(bytes(16))
    sink.close()
    assert (tmp_path / "whole").read_bytes() == bytes(80)
    monkeypatch.setattr(os, "fdatasync", broken)
    sink = LocalStore(tmp_path).create("broken")
    sink.write(bytes(16))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        sink.close()
    sink.abandon()
