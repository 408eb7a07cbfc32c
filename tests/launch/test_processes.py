"""Local runs: what a failing, dying or stopped rank does to the others, to the screen and to the exit code."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megacore.launch.failures import Failure, cause, describe
from megacore.launch.processes import Rank, run_local, verdict

ROOT = Path(__file__).parents[2]
TARGETS = "tests.launch.targets"


class Screen(list[str]):
    """Keeps what is written."""

    @property
    def text(self) -> str:
        return "".join(self)


@pytest.fixture
def screen() -> Screen:
    return Screen()


def run(name: str, nproc: int, screen: Screen, *args: object) -> int:
    return run_local(f"{TARGETS}:{name}", args, nproc, screen.append)


def test_the_ranks_meet_and_share_the_cores(tmp_path: Path, screen: Screen) -> None:
    assert run("write_sum", 3, screen, str(tmp_path)) == 0
    num_threads = max(1, len(os.sched_getaffinity(0)) // 3)
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [f"6.0 {num_threads}"] * 3
    assert screen.text == ""


def test_one_rank_runs_here_and_nothing_is_caught(screen: Screen) -> None:
    assert run("leave_with", 1, screen, [7]) == 7
    with pytest.raises(ValueError, match="must begin with pp"):
        run("user_error_on_all", 1, screen)
    assert screen.text == ""


def test_no_rank_is_an_error() -> None:
    with pytest.raises(ValueError, match="--nproc=0 must be at least 1"):
        run_local(f"{TARGETS}:leave_with", (), 0)


def test_a_rank_that_runs_out_of_memory_is_told_what_helps(screen: Screen) -> None:
    assert run("need_too_much", 2, screen) == 1
    text = " ".join(line.strip("│ ") for line in screen.text.splitlines())
    assert "rank 1 of 2 failed" in text and "allocate memory" in text
    assert "in this order: precision.dtype=bf16; parallel.recompute=full" in " ".join(text.split())


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_rank_that_raises_ends_all_with_its_cause(screen: Screen, seconds: float) -> None:
    assert run("raise_on_one", 3, screen, seconds) == 1
    assert "rank 1 of 3 failed: KeyError" in screen.text
    assert "'the cause'" in screen.text
    assert 'raise KeyError("the cause")' in screen.text
    assert "peer" not in screen.text
    assert screen.text.count("failed") == 1


def test_a_rank_that_is_killed_is_named(screen: Screen) -> None:
    assert run("die_on_one", 3, screen) == 1
    assert "rank 1 of 3 failed: SIGKILL" in screen.text
    assert "memory" in screen.text


def test_ranks_that_do_not_notice_are_ended_within_seconds(screen: Screen) -> None:
    begin = time.monotonic()
    assert run("one_hangs", 2, screen) == 1
    assert time.monotonic() - begin < 10
    assert "disk full" in screen.text


@pytest.mark.parametrize("dies", [False, True])
def test_a_rank_that_fails_inside_a_schedule_ends_all_within_ten_seconds(
    tmp_path: Path, screen: Screen, dies: bool
) -> None:
    assert run("fail_inside_a_schedule", 3, screen, str(tmp_path), dies) == 1
    assert time.time() - float((tmp_path / "failed").read_text()) < 10
    assert not list(tmp_path.glob("ended*"))
    assert ("SIGKILL" if dies else "the cause inside the schedule") in screen.text
    assert "rank 1 of 3" in screen.text


def test_a_user_error_is_one_line_and_code_2(screen: Screen) -> None:
    assert run("user_error_on_all", 2, screen) == 2
    assert screen.text == "megacore: parallel.order=tp-pp must begin with pp and name tp, cp and dp once each\n"


@pytest.mark.parametrize("name", ["leave_with", "exit_with"])
def test_exit_codes_pass_through(name: str, screen: Screen) -> None:
    assert run(name, 2, screen, [75, 75]) == 75
    assert run(name, 2, screen, [0, 3]) == 3
    assert screen.text == ""


def test_a_lost_peer_is_never_the_cause() -> None:
    lost = [Failure(r, "RuntimeError", "Connection closed by peer", is_follow_up=True, when=r) for r in (0, 2)]
    first, second = Failure(1, "KeyError", "x", when=5.0), Failure(3, "OSError", "y", when=6.0)
    assert cause([*lost, second, first]) is first
    assert cause(lost) is lost[0]


def test_the_box_holds_long_lines() -> None:
    box = describe(Failure(0, "E", "word " * 60, ("file.py:1 in f\n    " + "x" * 200,)), 2, width=70)
    assert {len(line) for line in box.splitlines()} == {70}
    assert box.count("x") == 200
    assert "    " in box


@pytest.fixture
def command(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A command of its own that runs two ranks which sleep; its answer to SIGTERM is that of a trainer."""
    yield from sleeping_command(tmp_path, save_on_term=True)


@pytest.fixture
def careless_command(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The same, but its ranks do not handle signals."""
    yield from sleeping_command(tmp_path, save_on_term=False)


def sleeping_command(folder: Path, save_on_term: bool) -> Iterator[subprocess.Popen[str]]:
    code = (
        "import sys\n"
        "from megacore.launch.processes import run_local\n"
        f"code = run_local('{TARGETS}:sleep_and_tell', ({str(folder)!r}, {save_on_term}), 2)\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until(lambda: process.poll() is not None or len(pids(folder)) == 2)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def pids(folder: Path) -> list[int]:
    return [int(file.read_text()) for file in folder.glob("*.pid") if file.read_text()]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def until(condition: object, seconds: float = 30.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")


@needs_proc
def test_ranks_die_with_a_killed_parent(command: subprocess.Popen[str], tmp_path: Path) -> None:
    ranks = pids(tmp_path)
    assert len(ranks) == 2
    assert all(alive(pid) for pid in ranks)
    command.kill()
    until(lambda: not any(alive(pid) for pid in ranks), 5.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_parent_lets_ranks_save(command: subprocess.Popen[str], number: signal.Signals) -> None:
    command.send_signal(number)
    _, errors = command.communicate(timeout=20)
    assert (command.returncode, errors) == (75, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_job_lets_ranks_save(command: subprocess.Popen[str], number: signal.Signals) -> None:
    os.killpg(command.pid, number)
    _, errors = command.communicate(timeout=20)
    assert (command.returncode, errors) == (75, "")


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_schedulers_repeat_themselves(command: subprocess.Popen[str], number: signal.Signals) -> None:
    """A second signal to the whole job, while its ranks save, ends neither the save nor the fork server."""
    os.killpg(command.pid, number)
    time.sleep(0.1)
    os.killpg(command.pid, number)
    _, errors = command.communicate(timeout=20)
    assert (command.returncode, errors) == (75, "")


def test_what_a_signal_makes_of_a_run() -> None:
    """Of ranks that died of it a run says that it has stopped; what else fails meanwhile is told."""
    said: list[str] = []
    killed, other = Failure.of_exit(1, -signal.SIGTERM), Failure(0, "OSError", "no space")

    def code(answer: Failure, stopped_by: int, stopped: int) -> int:
        return verdict([Rank(None, None, answer)], stopped_by, said.append, said.append, stopped)  # type: ignore[arg-type]

    assert code(killed, signal.SIGTERM, 0) == 128 + signal.SIGTERM and code(killed, signal.SIGTERM, 75) == 75
    assert code(killed, 0, 75) == 75, "one rank alone was asked"
    assert not said
    assert code(other, signal.SIGTERM, 75) == 128 + signal.SIGTERM and said[1] is other
    assert code(killed, 0, 0) == 1 and said[3] is killed


def test_ranks_that_do_not_handle_signals_die_of_them(careless_command: subprocess.Popen[str]) -> None:
    careless_command.send_signal(signal.SIGINT)
    _, errors = careless_command.communicate(timeout=20)
    assert (careless_command.returncode, errors) == (130, "")
