"""Trackers and alerts within a run: what the launcher refuses, what events and figures lead to, and who hears of it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megacore.exits import run
from megacore.launch.train import main
from megacore.layout import Layout
from megacore.mesh.mesh import ParallelMesh
from megacore.monitor import packages
from megacore.monitor.gpus import GPU_FIGURES
from megacore.monitor.jsonl import read_json_lines
from megacore.monitor.run_folder import EVENTS, LOG, METRICS
from megacore.train.devices import Devices
from megacore.train.reporter import Reporter
from tests.engine.common import run_config
from tests.pool import WorkerPool
from tests.train.runs import files_in, interrupted, words_of
from tests.train.test_reporter import CPU, late


class Gpu:
    """A sampler of a GPU that a rank does not have."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def read(self) -> tuple[float, ...]:
        return (0.9, 0.5, 100.0 * (self.rank + 1), 60.0, 1900.0, 0.0, 1.0, 0x40 if self.rank else 0.0)

    def close(self) -> None:
        """Nothing to do."""


def reporter_of(out: Path, rank: int = 0, world: int = 1, **log) -> Reporter:
    config = run_config(world, "train.steps=20", f"out={out}", f"parallel.pp={world}", "checkpoint.save_every=1000")
    config = replace(config, log=replace(config.log, **log))
    reporter = Reporter.open(config, ParallelMesh.build(Layout(pp=world), rank, CPU), colour=False, width=100)
    reporter.flops_per_token = 1.0
    return reporter


def events(out: Path, *names: str) -> list[dict]:
    return [event for event in read_json_lines(out / EVENTS) if event["event"] in names]


def said_by_ranks(rank: int, world_size: int, out: str) -> None:
    reporter = reporter_of(Path(out), rank, world_size, alerts=("gpu.power_w.max > 150", "gpu.slowed.max > 0 for 2"))
    reporter.devices = Devices(reporter.mesh, 1.0, Gpu(rank))
    for step in range(1, 4):
        reporter.step(late(step))
    reporter.close()


def test_the_gpus_of_all_ranks_are_written_down(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(said_by_ranks, 2, 2, str(tmp_path))
    for record in read_json_lines(tmp_path / METRICS):
        gpu = record["gpu"]
        assert gpu["power_w"] == {"mean": 150.0, "min": 100.0, "max": 200.0}
        assert gpu["joules_per_token"] == pytest.approx(300 / record["tokens_per_s"])
        assert gpu["slowed_ranks"] == {"hardware hot": [1]}
        assert set(gpu) == {*GPU_FIGURES, "joules_per_token", "slowed_ranks"}
        assert record["memory_gb"] > 0
    told = [(each["step"], each["alert"]) for each in events(tmp_path, "alert")]
    assert told == [(1, "gpu.power_w.max > 150"), (2, "gpu.slowed.max > 0 for 2")]


def test_alerts_of_figures_and_events_reach_log_and_command(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import pathlib, sys\nwith open(sys.argv[1], 'a') as file: file.write(sys.stdin.read() + '\\n')")
    out = tmp_path / "run"
    reporter = reporter_of(
        out,
        alerts=("loss > 2 * min(loss, 2)", "event straggler", "event hang", "steps_since_save > 6"),
        alert_command=f"{sys.executable} {script} {tmp_path / 'sent'}",
        prometheus_file=True,
    )
    for step in range(1, 9):
        loss = 9.0 if step in (5, 6) else 1.0
        each = late(step)
        each.result.loss.fill_(loss)
        reporter.step(each)
        if step == 3:
            reporter.warn("straggler", "rank 2 is slow", step=3)
    reporter.close()
    told = [(each["event"], each["step"], each["alert"]) for each in events(out, "alert", "alert_over")]
    assert told == [
        ("alert", 3, "event straggler"),
        ("alert", 5, "loss > 2 * min(loss, 2)"),
        ("alert_over", 7, "loss > 2 * min(loss, 2)"),
        ("alert", 7, "steps_since_save > 6"),
    ]
    sent = [json.loads(line) for line in (tmp_path / "sent").read_text().splitlines()]
    assert [(each["event"], each["step"], each["alert"]) for each in sent] == told
    assert {each["run"] for each in sent} == {str(out)}
    log = (out / LOG).read_text()
    assert log.count("rank 2 is slow") == 1
    assert log.count("alert  step 5: loss > 2 * min(loss, 2) (9 > 2)") == 1
    assert (
        'megacore_alert_active{run="' + str(out) + '",alert="steps_since_save > 6"} 1'
        in (out / "metrics.prom").read_text()
    )


def test_what_does_not_arrive_is_told_and_ends_nothing(tmp_path: Path) -> None:
    reporter = reporter_of(tmp_path, alerts=("loss > 0",), alert_webhook="http://127.0.0.1:9/")
    reporter.step(late(1))
    reporter.close()
    (unsent,) = events(tmp_path, "alert_not_sent")
    assert unsent["target"] == "log.alert_webhook"
    assert "an alert did not arrive" in (tmp_path / LOG).read_text()


def test_nothing_in_the_folder_of_a_run_says_its_secrets(letters: str, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "run"
    secrets = ("log.alert_webhook=http://127.0.0.1:9/topsecret", "log.alert_command=false topsecret")
    words = words_of(letters, out, *secrets, 'log.alerts=["loss > 0", "event fault"]', "log.prometheus_file=true")
    interrupted(monkeypatch, 4, words)
    assert main(words) == 0
    (resume,) = events(out, "resume")
    assert resume["changes"] == []
    assert len(events(out, "alert_not_sent")) >= 4
    assert main(words_of(letters, out, "train.steps=8")) == 0, "without any from here on"
    changed = events(out, "resume")[-1]["changes"]
    assert 'log.alert_webhook: (hidden) -> "" (safe)' in changed
    assert run("megacore.tools.report", [str(out)]) == 0
    found = {name: content for name, content in files_in(out).items() if b"topsecret" in content}
    assert not found
    assert {"config.toml", "report.html", "checkpoints/step-00000006/manifest.json"} <= set(files_in(out))
    # a run from its own config.toml goes on, and says what it lacks
    capsys.readouterr()
    (out / "config.toml").write_text(
        (out / "config.toml").read_text().replace('alert_webhook = ""', 'alert_webhook = "(hidden)"')
    )
    assert main([str(out / "config.toml"), "train.steps=9"]) == 0
    assert "log.alert_webhook was left out of this run file" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["log.tensorboard", "log.wandb", "log.mlflow"])
def test_a_missing_package_is_told_before_anything_starts(monkeypatch, capsys, tmp_path, letters, key) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    words = words_of(letters, tmp_path / "run", f"{key}=true")
    assert run("megacore.launch.train", words) == 2
    assert f"{key}=true needs the" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
