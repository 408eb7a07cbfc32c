"""The command that runs on each node of a job: stopped, killed, gone wrong, and started again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megacore.checkpoint.find import LATEST
from megacore.exits import STOPPED
from megacore.launch.places import free_port
from megacore.train.failpoints import VARIABLE
from tests.train.runs import events, figures, last_state, words_of, write_corpus

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
LONG = ("train.steps=4000", "optim.decay_steps=6", "train.eval_every=0")


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(str(tmp_path_factory.mktemp("data") / "letters"), 1)


def node(words: Sequence[str], *own: str) -> list[str]:
    return [sys.executable, "-m", "megacore.launch.node", "--nproc", "2", *own, *words]


def start(words: Sequence[str], *own: str, **more: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(node(words, *own), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, **more)


def wait_for(path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name} after {seconds} s"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["--nodes", "2", "--nproc", "2"], "--nodes=2 needs --meet"),
        (["--nodes", "x"], "--nodes=x must be"),
        (["--nproc", "0"], "--nproc=0 must be at least 1"),
        (["--nproc", "3", "parallel.tp=2"], "does not divide"),
        (["--dry-run"], "--dry-run"),
    ],
)
def test_wrong_input(
    own: list[str], message: str, letters: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megacore.exits import run

    assert run("megacore.launch.node", [*own, *words_of(letters, tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_node_that_comes_when_all_is_done(letters: str, tmp_path: Path) -> None:
    """The others have left, so nobody will ever be where they met."""
    from megacore.launch.agent import Outcome, gives_up
    from megacore.launch.endings import Endings
    from megacore.launch.rendezvous import Place
    from megacore.launch.restarts import Restarts
    from megacore.launch.train import main, parser, requested

    said: list[str] = []
    words = words_of(letters, tmp_path, "train.steps=2")
    config, _ = requested(parser().parse_args(words), None)
    outcome = Outcome(Endings(tmp_path), Restarts(config), said.append)
    place, gone = Place("job", "host", 1, "here", False), OSError("gone")
    assert gives_up(outcome, place, gone, time.monotonic() + 60) is None and "trying again" in said[-1]
    assert gives_up(outcome, place, gone, 0.0) == 1
    assert main(words) == 0
    assert gives_up(outcome, place, gone, time.monotonic() + 60) == 0 and "nothing is left to do" in said[-1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_it_saves_and_the_same_command_goes_on(number: int, letters: str, tmp_path: Path) -> None:
    words = words_of(letters, tmp_path, "parallel.tp=2", *LONG)
    process = start(words)
    wait_for(tmp_path / "checkpoints" / LATEST)
    process.send_signal(number)
    assert process.wait(60) == STOPPED
    (stop,) = events(tmp_path, "stop")
    assert [each["step"] for each in figures(tmp_path)] == list(range(1, stop["step"] + 1)), "no finished step is lost"
    more = [word if not word.startswith("train.steps") else f"train.steps={stop['step'] + 4}" for word in words]
    assert subprocess.run(node(more), env=ENVIRONMENT, timeout=120).returncode == 0
    assert [each["step"] for each in figures(tmp_path)] == list(range(1, stop["step"] + 5))
    assert process.stderr is not None and "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_killed_it_leaves_nobody_behind_and_the_same_command_goes_on(letters: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    short = ("parallel.tp=2", "train.steps=60", "optim.decay_steps=6", "train.eval_every=0")
    assert subprocess.run(node(words_of(letters, whole, *short)), env=ENVIRONMENT, timeout=120).returncode == 0
    words = words_of(letters, killed, *short)
    process = start(words)
    wait_for(killed / "checkpoints" / LATEST)
    ranks = children(process.pid)
    assert len(ranks) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while any(map(alive, ranks)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, ranks)), "children die with the command"
    assert subprocess.run(node(words), env=ENVIRONMENT, timeout=120).returncode == 0
    assert last_state(killed, 60) == last_state(whole, 60)


@pytest.mark.slow
def test_a_fault_is_shown_once_and_mended_by_a_restart(letters: str, tmp_path: Path) -> None:
    words = words_of(letters, tmp_path, "parallel.tp=2")
    fault = ENVIRONMENT | {VARIABLE: "step:1:4:raise"}
    done = subprocess.run(node(words), env=fault, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, "it comes back at every start"
    assert done.stderr.count("rank 1 of 2 failed") == 4 and "Traceback" not in done.stderr
    assert "has been started 3 times from step 2 and came to no newer checkpoint" in done.stderr
    assert [each["in_vain"] for each in events(tmp_path, "restart")] == [1, 2, 3]
    assert subprocess.run(node(words), env=ENVIRONMENT, timeout=120).returncode == 0
    killed = tmp_path / "killed"
    process = start(words_of(letters, killed, "parallel.tp=2", "train.steps=200", "optim.decay_steps=6"))
    wait_for(killed / "checkpoints" / LATEST)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    assert process.wait(120) == 0
    assert process.stderr is not None
    assert process.stderr.read().count("rank 1 of 2 failed: SIGKILL") == 1
    assert len(events(killed, "restart")) == 1


@pytest.mark.slow
def test_wrong_input_on_a_rank_is_final(letters: str, tmp_path: Path) -> None:
    """A checkpoint of another model is found when the ranks build: no restart mends that."""
    assert subprocess.run(node(words_of(letters, tmp_path)), env=ENVIRONMENT, timeout=120).returncode == 0
    words = words_of(letters, tmp_path, "model.ffn_hidden_size=48", "train.steps=8")
    done = subprocess.run(node(words), env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("megacore: ") == 1, done.stderr


@pytest.mark.slow
def test_plain_torchrun(letters: str, tmp_path: Path) -> None:
    """With restarts a stop ends the job with 0; without, its table has 75."""
    for restarts, code in (("3", 0), ("0", 1)):
        out = tmp_path / restarts
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
        command = [*torchrun, "--max-restarts", restarts, "-m", "megacore", "train"]
        words = words_of(letters, out, "parallel.tp=2", *LONG)
        process = subprocess.Popen([*command, *words], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        wait_for(out / "checkpoints" / LATEST)
        (out / "STOP").touch()
        _, error = process.communicate(timeout=60)
        assert process.returncode == code and len(events(out, "start")) == 1, error
        assert ("exitcode" in error and "75" in error) == bool(code)
    fault = ENVIRONMENT | {VARIABLE: "step:1:2:raise"}
    words = words_of(letters, tmp_path / "fault", "parallel.tp=2")
    done = subprocess.run([*command, *words], env=fault, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Provoked" in done.stderr.partition("Root Cause")[2], (
        "torchrun's table has the cause"
    )
