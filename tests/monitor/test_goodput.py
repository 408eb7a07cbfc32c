"""The share of a run's time that went into steps that count."""

import pytest

from megacore.monitor.goodput import goodput


def start(at: float, seconds: float) -> dict[str, object]:
    return {"event": "start", "time": at, "startup_s": {"join": seconds / 2, "data": seconds / 2}}


def test_two_starts() -> None:
    """Begun at 0, ready at 10, killed somewhere; the second start ready at 120; 60 steps of 2 s are kept."""
    events = [start(10.0, 10.0), start(120.0, 20.0), {"event": "finish", "time": 200.0}]
    metrics = [{"step": 20, "step_time_s": 2.0}, {"step": 60, "step_time_s": 2.0}]
    found = goodput(events, metrics)
    assert found is not None and found.share == pytest.approx(0.6)
    assert (found.startup_s, found.rest_s, found.num_starts) == (30.0, 50.0, 2)
    assert "60.0% of" in found.line() and "2 starts 15.0%" in found.line() and "lost 25.0%" in found.line()
    assert goodput(events, metrics, now=1000.0).share == pytest.approx(0.12)  # type: ignore[union-attr]


def test_nothing_yet() -> None:
    assert goodput([], []) is None
    found = goodput([start(5.0, 0.0)], [])
    assert found is not None and found.share == 0.0 and "0.0%" in found.line()
