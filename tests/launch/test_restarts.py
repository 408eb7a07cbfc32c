"""After a fault the ranks start again by themselves, and stop trying where that leads nowhere."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megacore.checkpoint.find import folder_of
from megacore.checkpoint.manifest import MANIFEST
from megacore.config.load import load
from megacore.config.schema import RunConfig
from megacore.launch.failures import Failure
from megacore.launch.restarts import newest_step, with_restarts
from megacore.monitor.jsonl import read_json_lines
from megacore.monitor.run_folder import EVENTS

KILLED = Failure(1, "SIGKILL", "the process was killed")


def config_of(out: Path, *words: str) -> RunConfig:
    return load(None, [f"out={out}", "checkpoint.save_every=10", *words], "demo")


class Attempts:
    """A run that saves some step each time and then fails, until it has saved its last one."""

    def __init__(self, saves: list[int], code: int = 1) -> None:
        self.saves, self.code, self.resumes = saves, code, list[str]()

    def __call__(self, config: RunConfig, tell: Callable[[Failure], None]) -> int:
        self.resumes.append(config.checkpoint.resume)
        if not self.saves:
            return 0
        if step := self.saves.pop(0):
            folder = Path(config.out) / "checkpoints" / folder_of(step)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / MANIFEST).touch()
        tell(KILLED)
        return self.code


def test_each_newer_checkpoint_gives_new_hope(tmp_path: Path) -> None:
    said: list[str] = []
    attempts = Attempts([10, 20, 0, 0, 30, 0, 0])
    assert with_restarts(config_of(tmp_path, "checkpoint.resume=never"), attempts, 3, said.append) == 0
    assert attempts.resumes == ["never", *["auto"] * 7]
    assert newest_step(config_of(tmp_path)) == 30
    assert [line.partition("restart ")[2][0] for line in said] == list("1123123")
    written = [(event["step"], event["in_vain"]) for event in read_json_lines(tmp_path / EVENTS)]
    assert written == [(10, 1), (20, 1), (20, 2), (20, 3), (30, 1), (30, 2), (30, 3)]
    assert "rank 1: SIGKILL" in read_json_lines(tmp_path / EVENTS)[0]["cause"]


def test_a_fault_that_comes_back_ends_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    attempts = Attempts([10, *[0] * 9])
    assert with_restarts(config_of(tmp_path), attempts, 3, said.append) == 1
    assert len(attempts.resumes) == 4
    assert "3 times from step 10" in said[-1] and "rank 1: SIGKILL: the process was killed" in said[-1]


@pytest.mark.parametrize(
    ("words", "limit", "code"),
    [((), 0, 1), (("checkpoint.save_every=0",), 3, 1), ((), 3, 2), ((), 3, 75), ((), 3, 143)],
)
def test_what_is_final(tmp_path: Path, words: tuple[str, ...], limit: int, code: int) -> None:
    attempts, said = Attempts([10, 20], code), list[str]()
    assert with_restarts(config_of(tmp_path, *words), attempts, limit, said.append) == code
    assert len(attempts.resumes) == 1 and not said


def test_bad_limits(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "megacore", "train", "--preset", "demo", "--max-restarts"]
    done = subprocess.run([*command, "-1"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--max-restarts=-1 must not be below 0" in done.stderr
    rank = os.environ | {"RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run([*command, "2"], capture_output=True, text=True, check=False, env=rank)
    assert done.returncode == 2 and "torchrun has --max-restarts" in done.stderr
