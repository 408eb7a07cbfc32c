"""TensorBoard gets every known figure under its tag; without the package the error says what to install."""

import sys

import pytest

from megacore.monitor.metrics import StepMetrics
from megacore.monitor.trackers import open_trackers


def test_none_by_default(tmp_path):
    assert list(open_trackers(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_tags_and_values(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (tracker,) = open_trackers(tmp_path, tensorboard=True)
    tracker.log(StepMetrics(1, 5.5, 0.25, 1e-3, 100, tokens_per_s=1000.0))
    tracker.log(StepMetrics(2, 4.5, 0.5, 1e-3, 200, tokens_per_s=2000.0, mfu=0.4, val_loss=4.75))
    tracker.log(StepMetrics(3, 4.0, 0.5, 1e-3, 300, statistics={"update_norm": {"mlp": 2.5}, "zero_fraction": 0.25}))
    tracker.text("samples/0", "def f():", 2)
    tracker.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("train/loss")] == [(1, 5.5), (2, 4.5), (3, 4.0)]
    assert [(point.step, point.value) for point in events.Scalars("statistics/update_norm/mlp")] == [(3, 2.5)]
    assert [(point.step, point.value) for point in events.Scalars("validation/loss")] == [(2, 4.75)]
    sent = "train/loss train/grad_norm train/learning_rate validation/loss throughput/tokens_per_sec throughput/mfu "
    sent += "statistics/update_norm/mlp statistics/zero_fraction"
    assert set(events.Tags()["scalars"]) == set(sent.split())
    assert any(tag.startswith("samples/0") for tag in events.Tags()["tensors"])


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r'pip install "megacore\[monitor\]"'):
        open_trackers(tmp_path, tensorboard=True)


def test_wandb_is_refused_not_ignored(tmp_path):
    with pytest.raises(ValueError, match=r"log.wandb=true"):
        open_trackers(tmp_path, wandb=True)
