"""The index cache: built once by racing processes, whole after a killed builder, never stale."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from megacore.data.cache import IndexCache

KEY = {"kind": "test"}


def no_message(text: str) -> None:
    raise AssertionError(text)


def build_slowly(folder: str, log: str, die: bool = False) -> np.ndarray:
    def build() -> dict[str, np.ndarray]:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.2)
        if die:
            Path(folder, "left.building-1").mkdir()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"a": np.arange(1000), "empty": np.zeros((0, 2))}

    return IndexCache(folder, no_message).get(KEY, build)["a"]


def check(folder: str, log: str) -> None:
    assert np.array_equal(build_slowly(folder, log), np.arange(1000))


def run(*jobs: tuple) -> list[int | None]:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=job[0], args=job[1:]) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_eight_racing_processes_build_once(tmp_path: Path) -> None:
    folder, log = str(tmp_path / "cache"), str(tmp_path / "log")
    assert run(*[(check, folder, log)] * 8) == [0] * 8
    assert len(Path(log).read_text().split()) == 1


def test_killed_builder(tmp_path: Path) -> None:
    folder, log = str(tmp_path / "cache"), str(tmp_path / "log")
    assert run((build_slowly, folder, log, True)) == [-signal.SIGKILL]
    assert (tmp_path / "cache" / "left.building-1").exists()
    assert run(*[(check, folder, log)] * 2) == [0, 0]
    assert len(Path(log).read_text().split()) == 2
    assert not list((tmp_path / "cache").glob("*.building-*"))


def test_builder_killed_while_others_wait(tmp_path: Path) -> None:
    folder, log = str(tmp_path / "cache"), str(tmp_path / "log")
    codes = run((build_slowly, folder, log, True), (check, folder, log), (check, folder, log))
    assert codes[0] in (0, -signal.SIGKILL) and codes[1:] == [0, 0]


@pytest.mark.parametrize("damage", ["truncated array", "hollow array", "missing array", "bad manifest"])
def test_damaged_entry_is_built_again(tmp_path: Path, damage: str) -> None:
    folder, log = str(tmp_path / "cache"), str(tmp_path / "log")
    check(folder, log)
    [array] = (tmp_path / "cache").glob("*/a.npy")
    if damage == "truncated array":
        array.write_bytes(array.read_bytes()[:-1])
    elif damage == "hollow array":
        whole = array.read_bytes()
        array.write_bytes(whole[:128] + bytes(len(whole) - 128))
    elif damage == "missing array":
        array.unlink()
    else:
        (array.parent / "manifest.json").write_text("{")
    check(folder, log)
    check(folder, log)
    assert len(Path(log).read_text().split()) == 2


def test_arrays_are_mapped_and_keys_differ(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path, no_message)
    first = cache.get({"seed": 1}, lambda: {"a": np.ones(3)})["a"]
    again = cache.get({"seed": 1}, lambda: {"a": np.zeros(3)})["a"]
    other = cache.get({"seed": 2}, lambda: {"a": np.zeros(3)})["a"]
    assert first.tolist() == again.tolist() == [1, 1, 1] and other.tolist() == [0, 0, 0]
    assert not again.flags.writeable and again.base is not None


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        arrays = IndexCache(folder, said.append).get(KEY, lambda: {"a": np.ones(3)})
        assert arrays["a"].tolist() == [1, 1, 1]
    assert len(said) == 2 and all("data.cache" in text and str(tmp_path / "file") in text for text in said)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", no_room)
    said: list[str] = []
    arrays = IndexCache(tmp_path, said.append).get(KEY, lambda: {"a": np.ones(3)})
    assert arrays["a"].tolist() == [1, 1, 1] and "No space" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_failing_build_is_not_hidden(tmp_path: Path) -> None:
    def fail() -> dict[str, np.ndarray]:
        raise OSError("the data went away")

    with pytest.raises(OSError, match="went away"):
        IndexCache(tmp_path, no_message).get(KEY, fail)
