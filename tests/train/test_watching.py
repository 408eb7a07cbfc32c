"""Profiles and logs of communication, of whole runs and of several ranks."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megacore.config.errors import ConfigError
from megacore.config.load import load
from megacore.config.schema import RunConfig
from megacore.config.validate import check
from megacore.exits import STOPPED
from megacore.launch.train import main
from megacore.mesh.group import Group
from megacore.mesh.named import named
from megacore.monitor import profile as profiling
from megacore.monitor.run_folder import COMMUNICATION, METRICS, PROFILE, PROFILE_NOW, STOP
from megacore.train.loop import Loop
from megacore.train.schedule import plan_schedule
from megacore.train.watching import STEPS_AT_ONCE, SUMMARY, Watching
from tests.engine.common import built_rank, run_config, step_of
from tests.pool import WorkerPool
from tests.train.runs import events, words_of
from tests.train.test_stopping import wait_for


def trace_of(out: Path, rank: int) -> list[dict[str, Any]]:
    with gzip.open(out / PROFILE / f"rank-{rank}.json.gz") as file:
        return [each for each in json.load(file)["traceEvents"] if each.get("ph") == "X"]


def test_a_profiled_run(letters: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(words_of(letters, out, "profile=[2,3]", "log.communication=2", "train.eval_every=0")) == 0
    said = capsys.readouterr().out
    assert "steps 2 to 3" in said and "gemm" in said and "attention" in said
    names = [each["name"] for each in trace_of(out, 0)]
    assert [name for name in names if name.startswith("step ")] == ["step 2", "step 3"]
    for instruction in (f"{op}0.{microbatch}" for op in "FB" for microbatch in range(4)):
        assert names.count(instruction) == 2, f"{instruction} once in each step"
    assert names.count("O") == 2
    summary = json.loads((out / PROFILE / SUMMARY).read_text())
    assert summary["steps"] == [2, 3] and summary["device"] == "cpu"
    assert summary["kinds"]["loss"]["ms"] > 0 and summary["kinds"]["optimizer"]["ms"] > 0
    assert sum(kind["share"] for kind in summary["kinds"].values()) == pytest.approx(1, abs=1e-3)
    assert sum(kind["ms"] for kind in summary["kinds"].values()) == pytest.approx(summary["step_ms"], rel=0.01)
    assert {"F", "B", "O"} <= set(summary["ranks"]["0"]["instructions_ms"])
    assert len(events(out, "profile")) == 1
    assert (out / COMMUNICATION / "rank-0.jsonl").read_text() == "", "one process says nothing"


@pytest.mark.slow
def test_a_file_asks_for_a_profile_while_the_run_goes_on(
    letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr("megacore.train.wishes.LOOK_EVERY_S", 0.0)
    (out / PROFILE_NOW).parent.mkdir()
    (out / PROFILE_NOW).touch()  # of before the start
    step = Loop.flush
    calls: list[int] = []

    def flush(loop: Loop) -> Any:
        calls.append(1)
        if len(calls) in (2, 7):  # the second while the first profile is under way: it waits for its end
            (out / PROFILE_NOW).touch()
        return step(loop)

    monkeypatch.setattr(Loop, "flush", flush)
    words = words_of(letters, out, "train.steps=16", "train.eval_every=0", "checkpoint.save_every=0", "profile=[14,15]")
    assert main(words) == 0
    assert not (out / PROFILE_NOW).exists()
    folders = sorted(path.parent.name for path in (out / PROFILE).rglob(SUMMARY))
    asked = [name for name in folders if name.startswith("step-")]
    assert len(asked) == 2 and len(folders) == 3
    steps = [json.loads((out / PROFILE / name / SUMMARY).read_text())["steps"] for name in asked]
    assert [last - first + 1 for first, last in steps] == [STEPS_AT_ONCE] * 2
    assert 3 <= steps[0][0] < steps[0][1] < steps[1][0] and steps[1][1] < 14
    assert json.loads((out / PROFILE / SUMMARY).read_text())["steps"] == [14, 15]
    assert len(events(out, "profile")) == 3


@pytest.mark.slow
def test_all_ranks_profile_the_same_steps(letters: str, tmp_path: Path) -> None:
    words = words_of(letters, tmp_path, "parallel.pp=2", "--nproc", "2", "train.steps=20000", "train.eval_every=0")
    command = [sys.executable, "-m", "megacore", "train", *words, "checkpoint.save_every=0", "optim.decay_steps=6"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    wait_for(tmp_path / METRICS)
    (tmp_path / PROFILE_NOW).touch()
    deadline = time.monotonic() + 60
    while not list((tmp_path / PROFILE).rglob(SUMMARY)) and time.monotonic() < deadline:
        time.sleep(0.05)
    (tmp_path / STOP).touch()
    assert process.wait(60) == STOPPED
    (folder,) = (tmp_path / PROFILE).iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.json.gz", "rank-1.json.gz", SUMMARY]
    first, last = json.loads((folder / SUMMARY).read_text())["steps"]
    assert last - first + 1 == STEPS_AT_ONCE and folder.name == f"step-{first:08d}"
    for rank in (0, 1):
        with gzip.open(folder / f"rank-{rank}.json.gz") as file:
            names = [each["name"] for each in json.load(file)["traceEvents"] if each.get("ph") == "X"]
        assert [name for name in names if name.startswith("step ")] == [
            f"step {each}" for each in range(first, last + 1)
        ]


def watched(rank: int, world_size: int, config: RunConfig) -> list[str]:
    """Three steps under the eyes of ``Watching``; the lines that rank 0 shows."""
    built = built_rank(rank, world_size, config)
    shown: list[str] = []
    reporter: Any = SimpleNamespace(profiled=lambda lines, folder, kinds: shown.extend(lines))
    watching = Watching(built)
    for step in (1, 2, 3):
        watching.begin(step)
        step_of(built, step, 0.001)
        assert watching.end(step, reporter) == (step < 3)
    watching.close()
    log = built.mesh.world.log
    assert log is not None and not log and log.ranges is None
    assert named(built, built.mesh.tp) is built, "nobody looks any more"
    assert built.trainer.engine.do == built.trainer.engine._do
    return shown


@pytest.mark.slow
def test_several_ranks(pool: WorkerPool, tmp_path: Path) -> None:
    overrides = ("parallel.tp=2", "parallel.pp=2", "log.profile=[2,2]", "log.profile_ranks=[0,3]")
    config = run_config(4, *overrides, "log.communication=1", f"out={tmp_path}")
    shown = pool.run(watched, 4, 4, config)
    assert any("mean of 2 ranks" in line for line in shown[0]) and not any(shown[1:])
    assert any(line.startswith("collectives tp") for line in shown[0])
    assert sorted(path.name for path in (tmp_path / PROFILE).iterdir()) == [
        "rank-0.json.gz",
        "rank-3.json.gz",
        SUMMARY,
    ]
    listed = plan_schedule(config, 4)
    for rank, pp_rank in ((0, 0), (3, 1)):
        words = [word for each in trace_of(tmp_path, rank) for word in each["name"].split(" ")]
        expected = [str(each) for each in listed.ranks[pp_rank]]
        assert all(words.count(text) == 1 for text in expected), "every instruction is a range of its own name"
        assert "exchange" in words
    summary = json.loads((tmp_path / PROFILE / SUMMARY).read_text())
    assert set(summary["ranks"]) == {"0", "3"}
    assert summary["kinds"]["collectives pp"]["ms"] > 0
    logs = [(tmp_path / COMMUNICATION / f"rank-{rank}.jsonl").read_text().splitlines() for rank in range(4)]
    records = [[json.loads(line) for line in log] for log in logs]
    for pair in ((0, 1), (2, 3)):
        of_pair = [[line for line in records[rank] if line["communicator"] == list(pair)] for rank in pair]
        assert of_pair[0] == of_pair[1] and len(of_pair[0]) > 10
    sends = [line for line in records[0] if line["operation"] == "send"]
    receives = [line for line in records[2] if line["operation"] == "receive"]
    assert [line["bytes"] for line in sends] == [line["bytes"] for line in receives] == [32 * 24 * 8] * 4
    assert {line["peer"] for line in sends} == {2} and {line["peer"] for line in receives} == {0}
    assert {line["step"] for log in records for line in log} == {1}


@pytest.mark.slow
def test_a_profile_that_cannot_be_written_ends_no_run(letters: str, tmp_path: Path) -> None:
    (tmp_path / PROFILE).symlink_to(tmp_path / "no" / "such" / "folder")
    assert main(words_of(letters, tmp_path, "profile=[2,2]", "train.eval_every=0", "train.steps=3")) == 0
    (warning,) = events(tmp_path, "warning")
    assert warning["step"] == 2 and "rank 0 could not write its profile" in warning["text"]


def test_one_profile_at_a_time() -> None:
    watching = Watching(built_rank(0, 1, run_config(1, "train.steps=20", "log.profile=[8,9]")))
    assert not watching.ask(6), "the run's own would begin within it"
    assert watching.ask(3) and watching.asked == range(3, 6)
    assert not watching.ask(4), "it is under way"
    assert [step for step in range(1, 21) if watching.profiled(step)] == [3, 4, 5, 8, 9]
    assert watching.ask(19) and watching.asked == range(19, 21), "no more than there are"
    assert not watching.ask(21)


def test_nothing_is_there_when_nobody_looks() -> None:
    config = run_config(1)
    built = built_rank(0, 1, config)
    log = built.mesh.world.log
    assert log is None or (not log.keeps and log.ranges is None)
    watching = Watching(built)
    watching.begin(1)
    assert built.trainer.engine.do == built.trainer.engine._do and watching.profile is None
    assert watching.end(1, SimpleNamespace()) is False  # type: ignore[arg-type]
    assert named(watching, Group.single("tp")) is watching


def test_a_profile_that_does_not_end_is_let_go_of(tmp_path: Path) -> None:
    built = built_rank(0, 1, run_config(1, "log.profile=[1,50]", f"out={tmp_path}"))
    watching = Watching(built)
    watching.begin(1)
    step_of(built, 1)
    assert watching.end(1, SimpleNamespace()) is False  # type: ignore[arg-type]
    watching.close()
    assert built.trainer.engine.do == built.trainer.engine._do
    torch.autograd.profiler.profile().__enter__().__exit__(None, None, None)  # another can begin
    assert not (tmp_path / PROFILE).exists()


def fake(name: str, start: float, end: float, kernels: tuple[tuple[str, float], ...] = (), thread: int = 1) -> Any:
    return SimpleNamespace(
        name=name,
        thread=thread,
        is_async=False,
        device_type=torch.autograd.DeviceType.CPU,
        time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start),
        kernels=[SimpleNamespace(name=kernel, duration=us) for kernel, us in kernels],
    )


def test_on_a_device_kernels_count_whatever_thread_launched_them() -> None:
    """Made-up events in the form that the profiler gives them in; not seen on a GPU yet."""
    found = profiling.profiled(
        [
            fake("step 1", 0, 1000, (("step 1", 900.0),)),
            fake("F0.0", 10, 100, (("F0.0", 300.0),)),
            fake("aten::mm", 20, 30, (("nvjet", 300.0),)),
            fake("aten::mul", 20, 30, (("vectorized_elementwise_kernel", 100.0),), thread=2),
            fake("dp_cp all_reduce", 40, 60, thread=2),
            fake("c10d::allreduce_", 45, 50, (("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 200.0),), thread=2),
        ],
        True,
    )
    assert found.kinds == pytest.approx(
        {"gemm": 0.3, "norms, activations, elementwise": 0.1, "collectives dp": 0.2, "idle, other": 0.4}
    )


def test_messages_under_way_are_no_work() -> None:
    """gloo's own events last as long as a message is under way, and others overlap with them."""
    found = profiling.profiled(
        [fake("step 1", 0, 1000), fake("gloo:send", 100, 900), fake("aten::mm", 150, 250), fake("F0.0", 140, 950)],
        False,
    )
    assert found.kinds == pytest.approx({"gemm": 0.1, "idle, other": 0.9})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["profile=[3,2]"], "log.profile=[3, 2] must be the first and the last step to profile, such as [3, 4]"),
        (["profile=3"], "log.profile=[3] must be"),
        (["profile=[0,2]"], "log.profile=[0, 2] must be"),
        (["log.profile=5,999"], "ends after the last step, train.steps=100; use steps up to 100"),
        (["log.profile_ranks=0"], "of no use without log.profile"),
        (["profile=1,2", "log.profile_ranks=[0,4]"], "names ranks of 4; they are 0 to 3"),
        (["profile=1,2", "log.profile_ranks=[1,1]"], "must be ranks, each once"),
        (["log.nvtx=true", "train.device=cpu"], "use log.profile"),
        (["log.communication=101"], "is more than train.steps=100; use at most 100"),
    ],
)
def test_what_cannot_be_watched_is_refused(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(load(None, ["train.steps=100", *words], "demo"), 4)
    assert expected in str(caught.value)


def test_nvtx_needs_a_gpu() -> None:
    built = built_rank(0, 1, run_config(1, "log.nvtx=true"))
    with pytest.raises(ValueError, match="log.nvtx=true marks ranges for a GPU's tools, but the run is on cpu"):
        Watching(built)
