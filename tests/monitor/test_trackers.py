"""Every tracker gets the figures of each step, keeps its run's identity, and never holds up the run."""

import sys
import threading
import time
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import pytest
from mlflow.tracking import MlflowClient
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megacore.config.schema import LogConfig, RunConfig
from megacore.monitor import packages, trackers
from megacore.monitor.background import Background
from megacore.monitor.metrics import StepMetrics
from megacore.monitor.packages import NEEDS, check_packages
from megacore.monitor.prometheus import Exposition, Server
from megacore.monitor.trackers import MLflow, WandB, open_trackers

GPU = {"power_w": {"mean": 500.0, "min": 400.0, "max": 600.0}, "joules_per_token": 0.5, "slowed_ranks": {"hot": [3]}}


def config_of(**log) -> RunConfig:
    return RunConfig(log=LogConfig(**log))


def opened(out: Path, first_step: int | None = None, **log):
    warnings: list[str] = []
    return open_trackers(out, config_of(**log), {"optim.lr": 0.1}, warnings.append, first_step), warnings


def metrics(step: int, **more) -> StepMetrics:
    return StepMetrics(step, 5.5 - step, 0.25, 1e-3, 100 * step, **more)


def test_none_by_default(tmp_path):
    assert opened(tmp_path) == ([], [])
    assert list(tmp_path.iterdir()) == []


def events_of(out: Path) -> EventAccumulator:
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_tags_and_values(tmp_path):
    (tracker,), _ = opened(tmp_path, tensorboard=True)
    tracker.log(metrics(1, tokens_per_s=1000.0))
    tracker.log(metrics(2, mfu=0.4, val_loss=4.75, gpu=GPU))
    tracker.log(metrics(3, statistics={"update_norm": {"mlp": 2.5}, "zero_fraction": 0.25}))
    tracker.text("samples/0", "def f():", 2)
    tracker.close()
    events = events_of(tmp_path)
    assert [(point.step, point.value) for point in events.Scalars("train/loss")] == [(1, 4.5), (2, 3.5), (3, 2.5)]
    assert [(point.step, point.value) for point in events.Scalars("statistics/update_norm/mlp")] == [(3, 2.5)]
    assert [(point.step, point.value) for point in events.Scalars("gpu/power_w/max")] == [(2, 600.0)]
    sent = "train/loss train/grad_norm train/learning_rate train/tokens validation/loss throughput/tokens_per_sec "
    sent += "throughput/mfu statistics/update_norm/mlp statistics/zero_fraction gpu/joules_per_token "
    sent += "gpu/power_w/mean gpu/power_w/min gpu/power_w/max"
    assert set(events.Tags()["scalars"]) == set(sent.split())
    assert any(tag.startswith("samples/0") for tag in events.Tags()["tensors"])


def test_tensorboard_forgets_steps_that_are_made_again(tmp_path):
    (first,), _ = opened(tmp_path, tensorboard=True)
    for step in range(1, 6):
        first.log(metrics(step))
    first.close()
    (second,), _ = opened(tmp_path, 4, tensorboard=True)
    second.log(replace(metrics(4), loss=9.0))
    second.close()
    points = events_of(tmp_path).Scalars("train/loss")
    assert [(point.step, point.value) for point in points] == [(1, 4.5), (2, 3.5), (3, 2.5), (4, 9.0)]


def test_wandb_is_told_every_figure_and_goes_on_with_one_run(tmp_path, monkeypatch):
    """Against its interface; that it works is for `test_wandb_writes_a_run`."""
    begun, logged = [], []
    run = SimpleNamespace(
        define_metric=lambda *a, **k: None, log=logged.append, summary={}, finish=lambda: logged.append("finished")
    )
    fake = SimpleNamespace(
        init=lambda **given: begun.append(given) or run, Settings=dict, Html=lambda text, inject: text
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        tracker = WandB(tmp_path, config_of(wandb=True, project="mine"), {"optim.lr": 0.1})
        tracker.log(metrics(7))
        tracker.text("samples", "<script>", 7)
        tracker.close()
    first, second = begun
    assert first == second
    assert first["id"] and (first["project"], first["resume"], first["mode"]) == ("mine", "allow", "offline")
    assert first["config"] == {"optim.lr": 0.1}
    assert first["dir"] == str(tmp_path)
    assert logged[0] == {
        "train/loss": -1.5, "train/grad_norm": 0.25, "train/learning_rate": 1e-3, "train/tokens": 700, "trainer/step": 7
    }  # fmt: skip
    assert logged[1] == {"samples": "<pre>&lt;script&gt;</pre>", "trainer/step": 7}
    assert logged[2] == "finished"


def test_wandb_writes_a_run(tmp_path):
    (tracker,), warnings = opened(tmp_path, wandb=True)
    for step in range(1, 4):
        tracker.log(metrics(step))
    tracker.text("samples", "a text", 3)
    tracker.event("save", {"step": 3})
    tracker.close()
    assert not warnings
    (stored,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    until = time.monotonic() + 20  # a process of W&B's own writes it
    while b"train/grad_norm" not in stored.read_bytes() and time.monotonic() < until:
        time.sleep(0.05)
    assert b"train/grad_norm" in stored.read_bytes()


def test_mlflow_keeps_figures_in_files_and_goes_on_with_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # as the launcher does
    for step in (1, 2):
        tracker = MLflow(tmp_path, config_of(mlflow=True), {"optim.lr": 0.1})
        tracker.log(metrics(step, mfu=float("nan")))
        tracker.text("samples", "a text", step)
        tracker.event("save", {"step": step})
        tracker.close()
    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("megacore").experiment_id])
    assert (run.data.params, run.data.tags["event.save"], run.info.status) == ({"optim.lr": "0.1"}, "2", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 4.5), (2, 3.5)]
    assert [each.path for each in client.list_artifacts(run.info.run_id, "samples")] == [
        "samples/step-00000001.txt",
        "samples/step-00000002.txt",
    ]


def samples_of(text: str) -> dict[tuple[str, str], float]:
    """By name and the label that is not the run."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            assert sample.labels.pop("run") == 'out/"a\\b"\n'
            found[sample.name, "".join(sample.labels.values())] = sample.value
    return found


def test_prometheus_reads_what_is_served(tmp_path):
    server = Server(Exposition('out/"a\\b"\n'), 0, "127.0.0.1")
    try:
        server.log(metrics(3, tokens_per_s=1e6, memory_gb=2.0, gpu=GPU))
        server.event("save", {"step": 3})
        server.event("alert", {"alert": 'loss > "1"'})
        with urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5) as answer:
            assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            found = samples_of(answer.read().decode())
    finally:
        server.close()
    for key, value in {
        ("megacore_step", ""): 3,
        ("megacore_loss", ""): 2.5,
        ("megacore_tokens_total", ""): 300,
        ("megacore_memory_peak_bytes", ""): 2e9,
        ("megacore_gpu_power_w", "max"): 600,
        ("megacore_gpu_joules_per_token", ""): 0.5,
        ("megacore_events_total", "save"): 1,
        ("megacore_events_total", "alert"): 1,
        ("megacore_alert_active", 'loss > "1"'): 1,
    }.items():
        assert found[key] == value
    assert found["megacore_last_record_timestamp_seconds", ""] == pytest.approx(time.time(), abs=60)


def test_prometheus_reads_figures_that_are_not_finite():
    exposition = Exposition('out/"a\\b"\n')
    exposition.log(replace(metrics(1), loss=float("nan"), grad_norm=float("inf")))
    exposition.event("alert", {"alert": "x"})
    exposition.event("alert_over", {"alert": "x"})
    found = samples_of(exposition.render())
    assert found["megacore_loss", ""] != found["megacore_loss", ""]
    assert found["megacore_grad_norm", ""] == float("inf")
    assert found["megacore_alert_active", "x"] == 0


def test_the_text_file_is_whole(tmp_path):
    (tracker,), warnings = opened(tmp_path, prometheus_file=True)
    tracker.log(metrics(1))
    tracker.close()
    assert not warnings
    assert "megacore_loss{" in (tmp_path / "metrics.prom").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.prom"]


def test_a_port_that_is_taken_does_not_end_the_run(tmp_path):
    server = Server(Exposition("a"), 0)
    try:
        found, (warning,) = opened(tmp_path, prometheus_port=server.port)
    finally:
        server.close()
    assert found == []
    assert f"log.prometheus_port={server.port}" in warning


class Stuck:
    """A tracker that waits for ever, or fails."""

    def __init__(self, wait: threading.Event | None) -> None:
        self.wait = wait

    def log(self, figures: StepMetrics) -> None:
        if self.wait is None:
            raise RuntimeError("no such server")
        self.wait.wait()

    def close(self) -> None:
        """Nothing to do."""


def test_a_tracker_that_fails_is_told_once_and_left_alone():
    warnings: list[str] = []
    background = Background("log.x", lambda: Stuck(None), warnings.append)
    for step in range(5):
        background.log(metrics(step))
    background.drain()
    background.close()
    background.log(metrics(6))
    assert warnings == ["log.x gets nothing from here on: RuntimeError: no such server"]
    assert not background.thread.is_alive()


def test_a_tracker_that_cannot_be_opened_is_told_once_and_left_alone():
    warnings: list[str] = []

    def make():
        raise OSError("no key")

    background = Background("log.x", make, warnings.append)
    for step in range(5):
        background.log(metrics(step))
    background.drain()
    background.close()
    assert warnings == ["log.x gets nothing from here on: OSError: no key"]
    assert not background.thread.is_alive()


def test_a_tracker_that_hangs_costs_no_time(monkeypatch):
    monkeypatch.setattr("megacore.monitor.background.MOST_WAITING", 10)
    monkeypatch.setattr("megacore.monitor.background.CLOSING_S", 0.05)
    warnings: list[str] = []
    wait = threading.Event()
    background = Background("log.x", lambda: Stuck(wait), warnings.append)
    began = time.monotonic()
    for step in range(50):
        background.log(metrics(step))
    background.close()
    assert time.monotonic() - began < 2
    wait.set()
    assert [text.split(":")[0] for text in warnings] == [
        "log.x is too slow",
        "log.x did not take everything within 0 s",
    ]


@pytest.mark.parametrize(("key", "package", "extra"), NEEDS)
def test_a_missing_package_is_refused_before_the_run(monkeypatch, key, package, extra):
    config = config_of(**{key.partition(".")[2]: True})
    monkeypatch.setattr(packages, "find_spec", lambda name: ModuleSpec(name, None))
    check_packages(config)
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf'{key}=true needs the {package} package.*"megacore\[{extra}\]"'):
        check_packages(config)
    check_packages(RunConfig())


def test_the_keys_of_a_run_have_one_identity_each(tmp_path):
    assert trackers.known_id(tmp_path, "a", lambda: "1") == "1"
    assert trackers.known_id(tmp_path, "b", lambda: "2") == "2"
    assert trackers.known_id(tmp_path, "a", lambda: "3") == "1"
    assert trackers.known_id(tmp_path, "a", lambda: "4", anew=True) == "4"
    (tmp_path / "trackers.json").write_text("[broken")
    assert trackers.known_id(tmp_path, "b", lambda: "5") == "5"
