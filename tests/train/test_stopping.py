"""Runs that are asked to stop or to save: after the step, on all ranks, with nothing lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from megacore.checkpoint.find import folder_of
from megacore.checkpoint.read import Checkpoint
from megacore.exits import STOPPED
from megacore.launch.train import main
from megacore.model.inputs import Inputs
from megacore.monitor.metrics import MetricsWriter
from megacore.monitor.run_folder import METRICS, PROFILE_NOW, SAVE, STOP, TENSORBOARD
from megacore.train.failpoints import Provoked
from megacore.train.loop import Loop
from megacore.train.step import Trainer
from megacore.train.watching import Watching
from megacore.train.wishes import LOOK_EVERY_S, Asked, Wishes
from tests.train.runs import STEPS, events, figures, last_state, words_of

CPU = torch.device("cpu")
STOPS = ("SIGTERM", "SIGUSR1", "SIGINT")


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: object) -> None:
    """``act()`` after a step's instructions were given, and before its figures are read."""
    flush = Loop.flush
    calls: list[int] = []

    def flush_and_act(loop: Loop) -> Asked:
        calls.append(1)
        if len(calls) == step:
            act()  # type: ignore[operator]
        return flush(loop)

    monkeypatch.setattr(Loop, "flush", flush_and_act)


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """Shells let what they start in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", STOPS)
def test_a_signal_saves_and_the_same_command_goes_on(
    name: str, letters: str, uninterrupted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = words_of(letters, tmp_path)
    before = signal.getsignal(signal.Signals[name])
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: os.kill(os.getpid(), signal.Signals[name]))
        assert main(words) == STOPPED
    assert signal.getsignal(signal.Signals[name]) == before
    (stop,) = events(tmp_path, "stop")
    assert 1 <= stop["step"] < STEPS and stop["samples"] == 8 * stop["step"] and stop["asked_by"] == [name]
    assert not events(tmp_path, "finish")
    assert [figure["step"] for figure in figures(tmp_path)] == list(range(1, stop["step"] + 1))
    assert main(words) == 0
    assert figures(tmp_path) == figures(uninterrupted["plain"])
    assert last_state(tmp_path) == last_state(uninterrupted["plain"])


def test_a_run_that_never_saves_is_saved_when_it_is_stopped(
    letters: str, uninterrupted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = words_of(letters, tmp_path, "checkpoint.save_every=0")
    with monkeypatch.context() as patch:
        at_step(patch, 2, (tmp_path / STOP).touch)
        patch.setattr("megacore.train.wishes.LOOK_EVERY_S", 0.0)
        assert main(words) == STOPPED
    assert not (tmp_path / STOP).exists()
    assert main(words) == 0
    assert figures(tmp_path) == figures(uninterrupted["plain"])


def test_a_file_asks_for_a_save(letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megacore.train.wishes.LOOK_EVERY_S", 0.0)
    at_step(monkeypatch, 2, (tmp_path / SAVE).touch)
    assert main(words_of(letters, tmp_path, "checkpoint.save_every=0")) == 0
    (save,) = events(tmp_path, "save")
    assert 2 < save["step"] < STEPS and not (tmp_path / SAVE).exists()


def test_what_lay_there_before_is_not_for_this_run(letters: str, tmp_path: Path) -> None:
    (tmp_path / STOP).touch()
    assert main(words_of(letters, tmp_path)) == 0


def test_stopped_while_it_evaluates(letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for the rest of a long evaluation."""
    seen = []

    def count(wishes: Wishes) -> torch.Tensor:
        seen.append(1)
        if len(seen) == 4:  # two steps, one batch of the first evaluation, then this one
            os.kill(os.getpid(), signal.SIGTERM)
        return now(wishes)

    now = Wishes.now
    monkeypatch.setattr(Wishes, "now", count)
    assert main(words_of(letters, tmp_path, "train.eval_steps=50", "data.split=1,1,0")) == STOPPED
    assert events(tmp_path, "stop")[0]["step"] == 2 and len(seen) < 10
    assert "val_loss" not in figures(tmp_path)[1]


def in_batch(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> list[int]:
    """``act()`` before batch ``number`` of all evaluations; returns a list as long as they are by now."""
    evaluate = Trainer.evaluate
    seen: list[int] = []

    def watched(trainer: Trainer, microbatches: list[Inputs]) -> torch.Tensor:
        seen.append(1)
        if len(seen) == number:
            act()
        return evaluate(trainer, microbatches)

    monkeypatch.setattr(Trainer, "evaluate", watched)
    return seen


def test_an_evaluation_that_a_stop_left_out_is_made_up(
    letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, whatever else befalls the run meanwhile: and then nothing tells it from one that never was stopped."""
    best = ("checkpoint.keep=1", "checkpoint.keep_best=1", "optim.lr=0.3", "optim.warmup_steps=5")  # is step 4
    more = ("train.eval_steps=5", "log.every=5", "log.tensorboard=true", *best)
    assert main(words_of(letters, tmp_path / "whole", *more)) == 0
    words, out = words_of(letters, tmp_path / "run", *more), tmp_path / "run"

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        in_batch(patch, 7, stop)
        assert main(words) == STOPPED
    assert [figure["step"] for figure in figures(out) if "val_loss" not in figure] == [1, 4], "logged all the same"
    before = last_state(out, 4)
    with monkeypatch.context() as patch:
        in_batch(patch, 2, stop)
        assert main(words) == STOPPED
    assert [event["step"] for event in events(out, "stop")] == [4, 4]
    for place in (MetricsWriter, "write"), (Watching, "begin"):  # while it is written down, and after that
        with monkeypatch.context() as patch, pytest.raises(Provoked):
            patch.setattr(*place, provoked)
            main(words)
    assert figures(out) == figures(tmp_path / "whole")[:3] and figures(out)[-1]["step"] == 4
    assert last_state(out, 4) == before and state_of(out, 4) == state_of(tmp_path / "whole", 4)
    with monkeypatch.context() as patch:
        seen = in_batch(patch, 0, stop)
        assert main(words) == 0
    assert len(seen) == 5, "that of the last step alone: no other is made twice"
    assert figures(out) == figures(tmp_path / "whole")
    assert last_state(out) == last_state(tmp_path / "whole")
    assert kept(out) == kept(tmp_path / "whole") == [folder_of(4), folder_of(6)]
    assert told(out) == told(tmp_path / "whole")


def provoked(*args: object) -> None:
    raise Provoked("here")


def state_of(out: Path, step: int) -> Mapping[str, object]:
    return Checkpoint.open(str(out / "checkpoints" / folder_of(step))).manifest.state


def told(out: Path) -> dict[int, float]:
    """The validation losses that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(out / TENSORBOARD)).Reload()
    return {each.step: each.value for each in shown.Scalars("validation/loss")}


def kept(out: Path) -> list[str]:
    return sorted(each.name for each in (out / "checkpoints").glob("step-*"))


def test_wishes_of_one_rank(tmp_path: Path) -> None:
    times = iter([0.0, 0.0, LOOK_EVERY_S / 2, LOOK_EVERY_S, LOOK_EVERY_S])
    wishes = Wishes(tmp_path, True, CPU, lambda: next(times))
    (tmp_path / SAVE).touch()
    assert Asked.of(wishes.now()) == Asked(save=1)
    wishes.saved()
    assert not (tmp_path / SAVE).exists()
    (tmp_path / STOP).touch()
    assert Asked.of(wishes.now()) == Asked(), "it looks twice a second"
    assert Asked.of(wishes.now()) == Asked(stop=1)
    with wishes.listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_files_that_cannot_be_removed_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of another user in a folder that all may write to: the run must not stop, or save, again and again."""
    (tmp_path / STOP).touch()
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path: os.unlink(tmp_path / "not" / "ours"))
    wishes = Wishes(tmp_path, True, CPU, iter(range(100)).__next__)
    assert Asked.of(wishes.now()) == Asked(), "it was there before the run"
    for name, asked in ((SAVE, Asked(save=1)), (PROFILE_NOW, Asked(profile=1))):
        (tmp_path / name).touch()
        assert Asked.of(wishes.now()) == asked
        (wishes.saved if name == SAVE else wishes.profiling)()
        assert Asked.of(wishes.now()) == Asked(), "it is done"
        os.utime(tmp_path / name, ns=(1, 1))  # made anew
        assert Asked.of(wishes.now()) == asked
        monkeypatch.setattr(Path, "unlink", unlink)
        (wishes.saved if name == SAVE else wishes.profiling)()
        assert not (tmp_path / name).exists() and Asked.of(wishes.now()) == Asked()
        monkeypatch.setattr(Path, "unlink", lambda path: os.unlink(tmp_path / "not" / "ours"))


def test_folders_of_their_names_are_no_wishes(tmp_path: Path) -> None:
    """Some file systems do not tell PROFILE from the folder profile."""
    wishes = Wishes(tmp_path, True, CPU, iter(range(100)).__next__)
    for name in (STOP, SAVE, PROFILE_NOW):
        (tmp_path / name).mkdir()
    assert Asked.of(wishes.now()) == Asked()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parallel.tp=2", "parallel.pp=2", "parallel.zero=3"])
@pytest.mark.parametrize("who", ["launcher", "0", "1"])
def test_any_rank_may_hear_of_it(layout: str, who: str, letters: str, tmp_path: Path) -> None:
    """Whoever gets the signal, all ranks stop after the same step; the launcher says 75."""
    words = words_of(
        letters, tmp_path, layout, "--nproc", "2", "train.steps=2000", "optim.decay_steps=6", "log.every=1"
    )
    command = [sys.executable, "-m", "megacore", "train", *words]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    wait_for(tmp_path / METRICS)
    target = process.pid if who == "launcher" else ranks_of(process.pid)[int(who)]
    os.kill(target, signal.SIGTERM)
    assert process.wait(60) == STOPPED
    (stop,) = events(tmp_path, "stop")
    assert [figure["step"] for figure in figures(tmp_path)] == list(range(1, stop["step"] + 1))
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"step-{stop['step']:08d}\n"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parallel.tp=2", "parallel.pp=2", "parallel.zero=3"])
def test_an_evaluation_of_several_ranks_is_made_up(layout: str, letters: str, tmp_path: Path) -> None:
    best = ("checkpoint.keep=1", "checkpoint.keep_best=1")
    more = (layout, "--nproc", "2", "train.eval_steps=60", "data.split=1,1,0", "log.every=1", *best)
    out = tmp_path / "run"
    command = [sys.executable, "-m", "megacore", "train", *words_of(letters, out, *more)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    wait_for(out / METRICS)  # with step 1, which is written during step 2: and then it evaluates for seconds
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == STOPPED
    assert events(out, "stop")[0]["step"] == 2 and "val_loss" not in figures(out)[1]
    for folder in (out, tmp_path / "whole"):
        assert main(words_of(letters, folder, *more)) == 0
    assert figures(out) == figures(tmp_path / "whole") and len(figures(out)) == STEPS
    assert last_state(out) == last_state(tmp_path / "whole")
    assert state_of(out, STEPS) == state_of(tmp_path / "whole", STEPS)
    assert kept(out) == kept(tmp_path / "whole")


def wait_for(path: Path, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.exists(), "the run has not begun"


def ranks_of(launcher: int) -> list[int]:
    """The processes that train, in the order in which they were started: children of the launcher's fork server."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            found.append((int(entry.name), int(stat.rpartition(")")[2].split()[1])))
    servers = {pid for pid, parent in found if parent == launcher}
    return sorted(pid for pid, parent in found if parent in servers)
