"""What a run writes: which steps, with which averages, and what happened to steps that were skipped."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megacore.config.schema import RunConfig
from megacore.layout import Layout
from megacore.mesh.mesh import ParallelMesh
from megacore.monitor.jsonl import read_json_lines
from megacore.monitor.run_folder import EVENTS, LOG, METRICS
from megacore.optim.statistics import Statistics
from megacore.train import devices
from megacore.train.loop import Late
from megacore.train.meter import Skips
from megacore.train.reporter import MANY_SKIPS, Reporter
from megacore.train.step import StepResult
from tests.engine.common import run_config
from tests.pool import WorkerPool

CPU = torch.device("cpu")
STEPS = 60


def late(step: int, skipped: bool = False, val_loss: float | None = None, statistics: Statistics | None = None) -> Late:
    """A step of 10 tokens that took as many seconds as its number."""
    asked = torch.zeros(2)
    result = StepResult(torch.tensor(1.0 / step), torch.tensor(2.0), torch.tensor(float(skipped)), asked, statistics)
    began = SimpleNamespace()
    ended = SimpleNamespace(seconds_since=lambda mark: float(step) if mark is began else pytest.fail("other mark"))
    value = None if val_loss is None else torch.tensor(val_loss)
    return Late(step, result, 0.1, began, ended, 10, value)  # type: ignore[arg-type]


def config_of(out: Path, **log: int) -> RunConfig:
    config = run_config(1, f"train.steps={STEPS}", f"out={out}")
    return replace(config, log=replace(config.log, **log))


def reporter_of(config: RunConfig) -> Reporter:
    reporter = Reporter.open(config, ParallelMesh.build(Layout(), 0, CPU), colour=False, width=100)
    reporter.flops_per_token = 1.0
    return reporter


def records(out: Path) -> list[dict]:
    return read_json_lines(out / METRICS)


def events(out: Path, name: str) -> list[dict]:
    return [event for event in read_json_lines(out / EVENTS) if event["event"] == name]


def shown_steps(out: Path) -> list[int]:
    lines = (out / LOG).read_text().splitlines()
    return [int(line.split()[1].split("/")[0]) for line in lines if line.startswith("step")]


@pytest.mark.parametrize(("every", "console_every"), [(10, 4), (4, 10), (7, 0), (1, 1)])
def test_the_file_and_the_console_keep_their_own_steps(tmp_path: Path, every: int, console_every: int) -> None:
    reporter = reporter_of(config_of(tmp_path, every=every, console_every=console_every))
    for step in range(1, STEPS + 1):
        reporter.step(late(step, val_loss=3.0 if step == 33 else None))
    reporter.close()
    always = {1, 33, STEPS}
    written = records(tmp_path)
    expected = sorted(always | set(range(every, STEPS + 1, every)))
    assert [record["step"] for record in written] == expected
    gap = console_every or every
    assert shown_steps(tmp_path) == sorted(always | set(range(gap, STEPS + 1, gap)))
    assert [record["step"] for record in written if "val_loss" in record] == [33]
    for before, record in zip([0, *expected], written):
        steps = range(before + 1, record["step"] + 1)
        assert record["step_time_s"] == pytest.approx(sum(steps) / len(steps))
        assert record["tokens_per_s"] == pytest.approx(10 * len(steps) / sum(steps))
        assert record["tokens"] == 10 * record["step"]


def test_statistics_are_written_when_there_are_some(tmp_path: Path) -> None:
    config = config_of(tmp_path, every=10, statistics_every=4)
    reporter = reporter_of(config)
    for step in range(1, STEPS + 1):
        due = step % 4 == 0
        assert reporter.is_due(step) or not due
        values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, float(step), 0.5, 0.25], dtype=torch.float64)
        reporter.step(late(step, statistics=Statistics(("mlp", "norms"), values) if due else None))
    reporter.close()
    written = records(tmp_path)
    assert [record["step"] for record in written if "statistics" in record] == list(range(4, STEPS + 1, 4))
    assert written[1]["statistics"] == {
        "parameter_norm": {"mlp": 1.0, "norms": 2.0},
        "gradient_norm": {"mlp": 3.0, "norms": 4.0},
        "update_norm": {"mlp": 5.0, "norms": 4.0},
        "clipped_fraction": 0.5,
        "zero_fraction": 0.25,
    }
    assert shown_steps(tmp_path) == [1, *range(10, STEPS + 1, 10)]


def test_skips_between_records_are_not_lost(tmp_path: Path) -> None:
    reporter = reporter_of(config_of(tmp_path, every=10))
    for step in range(1, STEPS + 1):
        reporter.step(late(step, skipped=step in (3, 5, 20)))
    reporter.finish()
    reporter.close()
    assert [record["step"] for record in records(tmp_path) if record["skipped"]] == [10, 20]
    told = [(event["first_step"], event["last_step"], event["count"]) for event in events(tmp_path, "skip")]
    assert told == [(2, 10, 2), (11, 20, 1)]
    assert not events(tmp_path, "warning")
    assert events(tmp_path, "finish")[0]["skipped"] == 3
    assert "3 of 60 steps skipped" in (tmp_path / LOG).read_text().splitlines()[-1]


def test_many_skips_in_a_row_are_warned_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = reporter_of(config_of(tmp_path, every=7))
    for step in range(1, STEPS + 1):
        reporter.step(late(step, skipped=step > 1))
    reporter.finish()
    reporter.close()
    (warning,) = events(tmp_path, "warning")
    assert warning["step"] == 21  # the first record with 20 in a row behind it
    out = capsys.readouterr().out
    assert out.count("20 steps in a row were skipped") == 1
    assert "59 of 60 steps skipped" in out.splitlines()[-1]


def test_rows_of_skips_are_counted_on_the_device() -> None:
    skips = Skips(CPU)
    for row in (3, 5, 2):
        for skipped in [1.0] * row + [0.0]:
            skips.add(torch.tensor(skipped))
    assert (skips.total, skips.longest_row) == (10, 5)
    assert MANY_SKIPS == 20


def test_a_run_without_skips_does_not_speak_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = reporter_of(config_of(tmp_path))
    reporter.step(late(1))
    reporter.finish()
    reporter.close()
    assert "skipped" not in capsys.readouterr().out
    assert not events(tmp_path, "skip")


def test_a_fault_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = reporter_of(config_of(tmp_path))
    reporter.fault(KeyError("the cause"))
    reporter.close()
    assert events(tmp_path, "fault")[0]["error"] == "KeyError: 'the cause'"
    assert (tmp_path / LOG).read_text().splitlines()[-1] == "fault: KeyError: 'the cause'"
    assert "the cause" not in capsys.readouterr().out  # the terminal is told by whoever catches it


def test_an_earlier_run_is_put_aside(tmp_path: Path) -> None:
    for number in range(3):
        reporter = reporter_of(config_of(tmp_path))
        reporter.step(late(number + 1))
        reporter.close()
    assert [record["step"] for record in records(tmp_path)] == [3]
    kept = sorted((tmp_path / "previous").iterdir())
    assert [folder.name for folder in kept] == ["1", "2"]
    assert [[record["step"] for record in records(folder)] for folder in kept] == [[1], [2]]
    assert all(json.loads((folder / METRICS).read_text())["step"] for folder in kept)


def said_by_ranks(rank: int, world_size: int, out: str, every: int) -> None:
    """Every rank of a pipeline of two reports; the peak is a GB more on each rank and in each step."""
    peaks = {"step": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "peak_memory_gb", lambda _: peaks["step"] + rank)
        config = config_of(Path(out), every=every)
        config = replace(config, train=replace(config.train, eval_every=7))
        reporter = Reporter.open(config, ParallelMesh.build(Layout(pp=world_size), rank, CPU), False, 100)
        reporter.flops_per_token = 1e12
        for step in range(1, STEPS + 1):
            peaks["step"] = step + 1  # a step is reported while the next one runs
            reporter.step(late(step, val_loss=3.0 if step % 7 == 0 or step == STEPS else None))
        reporter.close()


@pytest.mark.parametrize("every", [1, 10])
def test_figures_are_those_of_all_ranks(pool: WorkerPool, tmp_path: Path, every: int) -> None:
    pool.run(said_by_ranks, 2, 2, str(tmp_path), every)
    written = records(tmp_path)
    due = [step for step in range(1, STEPS + 1) if step in (1, STEPS) or step % every == 0 or step % 7 == 0]
    assert [record["step"] for record in written] == due
    # before the first step nobody asks, so that one is asked for late; then more seldom, every ten steps at last
    asked = {1: [1, 2, 4, 8, 16, 26, 36, 46, 56], 10: [1, 7, 14, 28, 40, 50, 60]}[every]
    for record in written:
        newest = max(step for step in asked if step <= record["step"])
        # the second rank's, once it had begun the step
        assert record["memory_gb"] == max(newest, 2) + 1
        assert record["tflops_per_device"] == pytest.approx(record["tokens_per_s"] / 2)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made"):
        reporter_of(config_of(tmp_path / "file" / "run"))
