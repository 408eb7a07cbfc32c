"""Runs that are killed, whose disk is full, or whose checkpoints were spoilt: what is whole is gone on from."""

import shutil
from itertools import product
from pathlib import Path

import pytest
import torch

from megacore.checkpoint.find import ASIDE, folder_of
from megacore.checkpoint.manifest import MANIFEST
from megacore.checkpoint.read import Checkpoint
from megacore.launch.train import main
from megacore.monitor.run_folder import LOG
from megacore.train.failpoints import VARIABLE
from megacore.train.loop import Loop
from tests.checkpoint.common import digests
from tests.train.runs import LAYOUTS, STEPS, events, figures, interrupted, killed, last_state, told, words_of


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_started_again(ranks: int, letters: str, uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    """SIGKILL: nobody has time to say goodbye."""
    layout = () if ranks == 1 else (*LAYOUTS["zero"], "--nproc", "2")
    words = words_of(letters, tmp_path / "run", *layout)
    killed(f"step:{ranks - 1}:6:kill", words)
    assert [record["step"] for record in figures(tmp_path / "run")][:4] == [1, 2, 3, 4]
    assert main(words) == 0
    expected = uninterrupted["plain"]
    if ranks == 2:
        expected = tmp_path / "whole"
        assert main(words_of(letters, expected, *layout)) == 0
    assert figures(tmp_path / "run") == figures(expected)
    assert last_state(tmp_path / "run") == last_state(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "rank"),
    [*product(("write#1", "write#9", "fsync#1"), (0, 1)), ("rename#1", 0), ("rename#2", 0), ("remove#1", 0)],
)
def test_killed_in_a_save(point: str, rank: int, letters: str, tmp_path: Path) -> None:
    """Of two ranks one dies in the third save, which takes the first checkpoint away."""
    words = words_of(letters, tmp_path / "run", *LAYOUTS["zero"], "checkpoint.keep=2", "--nproc", "2")
    assert "SIGKILL" in killed(f"{point}:{rank}:6:kill", words)
    assert Checkpoint.open(str(tmp_path / "run")).manifest.step in (4, 6)
    assert main(words) == 0
    whole = tmp_path / "whole"
    assert main(words_of(letters, whole, *LAYOUTS["zero"], "checkpoint.keep=2", "--nproc", "2")) == 0
    assert figures(tmp_path / "run") == figures(whole)
    assert last_state(tmp_path / "run") == last_state(whole)
    folders = sorted(each.name for each in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert folders[-2:] == [folder_of(4), folder_of(6)]
    # once the last checkpoint is there nothing is left to do, and nothing is saved that would take others away
    assert len(folders) == 2 or point in ("rename#2", "remove#1")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_takes_up_what_two_left(
    layout: str, letters: str, uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    killed("step:1:6:kill", words_of(letters, tmp_path, *LAYOUTS[layout], "--nproc", "2"))
    assert main(words_of(letters, tmp_path)) == 0
    for ours, expected in zip(figures(tmp_path), figures(uninterrupted["plain"]), strict=True):
        assert ours == pytest.approx(expected, rel=1e-9, abs=0)


def test_a_damaged_checkpoint_is_passed_over(letters: str, uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(uninterrupted["plain"], out)
    spoilt = out / "checkpoints" / folder_of(6) / "rank-00000.safetensors"
    data = bytearray(spoilt.read_bytes())
    data[len(data) // 2] ^= 16
    spoilt.write_bytes(data)
    assert main(words_of(letters, out)) == 0
    (resume,) = events(out, "resume")
    (reason,) = resume["rejected"]
    assert resume["step"] == 4 and f"{spoilt} was damaged" in reason
    assert f"passed over: {reason}" in (out / LOG).read_text()
    assert figures(out) == figures(uninterrupted["plain"])
    assert last_state(out) == last_state(uninterrupted["plain"])
    assert (out / "checkpoints" / ASIDE / f"{folder_of(6)}-1").exists()


def test_nothing_whole_is_no_new_beginning(
    letters: str, uninterrupted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(uninterrupted["plain"], out)
    folders = sorted((out / "checkpoints").glob("step-*"))
    for folder in folders:
        (folder / "rank-00000.safetensors").unlink()
    error = told(capsys, words_of(letters, out))
    assert error.count("rank-00000.safetensors is missing") == 3
    assert "restore one, or set checkpoint.resume=never to begin anew" in error
    for folder in folders:
        (folder / MANIFEST).unlink()
    assert "holds no whole checkpoint" in told(capsys, words_of(letters, out))
    assert figures(out) == figures(uninterrupted["plain"])


def test_a_full_disk_does_not_stop_a_run(
    letters: str, uninterrupted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "write#3:0:4:enospc")
    assert main(words_of(letters, tmp_path)) == 0
    (failed,) = events(tmp_path, "save_failed")
    assert failed["step"] == 4 and "No space left on device" in failed["reason"]
    assert [event["step"] for event in events(tmp_path, "save")] == [2, 6]
    assert figures(tmp_path) == figures(uninterrupted["plain"])
    assert sorted(each.name for each in (tmp_path / "checkpoints").glob("step-*")) == [folder_of(2), folder_of(6)]


def test_a_run_whose_end_is_not_saved_fails(
    letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, "write#3:0:6:enospc")
    error = told(capsys, words_of(letters, tmp_path), code=1)
    assert "step 6 could not be saved" in error and "No space left on device" in error
    assert "step 6 could not be saved" in events(tmp_path, "fault")[0]["error"]
    monkeypatch.delenv(VARIABLE)
    assert main(words_of(letters, tmp_path)) == 0
    assert events(tmp_path, "resume")[0]["step"] == 4


def test_a_folder_that_cannot_be_written(letters: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", tmp_path / "file"):
        for more in ((), ("checkpoint.save_every=0",)):
            error = told(capsys, words_of(letters, out, *more))
            assert f"out={out} " in error and "name a folder" in error


def test_a_run_that_has_come_to_nothing_is_saved(letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its validation loss is no number, which JSON has not."""
    monkeypatch.setattr(Loop, "evaluate", lambda loop, hurries: torch.tensor(torch.nan))
    more = ("checkpoint.keep_best=1",)
    assert main(words_of(letters, tmp_path, *more)) == 0
    assert [event["step"] for event in events(tmp_path, "save")] == [2, 4, 6]
    assert "val_loss" not in Checkpoint.open(str(tmp_path)).manifest.state


def test_checkpoints_in_an_object_store(
    letters: str, uninterrupted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec")
    folder = f"memory://{tmp_path.name}/checkpoints"
    words = words_of(letters, tmp_path, f"checkpoint.folder={folder}")
    interrupted(monkeypatch, 6, words)
    assert main(words) == 0
    assert figures(tmp_path) == figures(uninterrupted["plain"])
    assert digests(folder, STEPS) == last_state(uninterrupted["plain"])
    assert events(tmp_path, "resume")[0]["step"] == 4
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_two_ranks_and_an_object_store(letters: str, tmp_path: Path) -> None:
    """A folder of this machine, as fsspec has it."""
    folder = f"local://{tmp_path / 'far'}"
    words = words_of(letters, tmp_path / "run", f"checkpoint.folder={folder}", *LAYOUTS["zero"], "--nproc", "2")
    killed("write#9:1:4:kill", words)
    assert main(words) == 0
    whole = tmp_path / "whole"
    assert main(words_of(letters, whole, *LAYOUTS["zero"], "--nproc", "2")) == 0
    assert figures(tmp_path / "run") == figures(whole)
    assert digests(folder, STEPS) == last_state(whole)


def test_a_rank_dies_and_the_run_goes_on_unaided(letters: str, uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    """The fault comes back each time until the command gives up; the same command without it finishes."""
    layout = (*LAYOUTS["zero"], "checkpoint.async_save=false", "--nproc", "2")
    words = words_of(letters, tmp_path / "run", *layout)
    error = killed("step:1:6:kill", words, max_restarts=1)
    assert "starting again from step 4" in error
    assert "started 1 times from step 4" in error and "SIGKILL" in error
    (resume,) = events(tmp_path / "run", "resume")
    assert (resume["step"], resume["again_until_step"], resume["again_until_sample"]) == (4, 4, 32)
    assert main(words) == 0
    for ours, expected in zip(figures(tmp_path / "run"), figures(uninterrupted["plain"]), strict=True):
        assert ours == pytest.approx(expected, rel=1e-9, abs=0)
