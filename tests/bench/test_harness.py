"""The harness takes turns fairly and computes its ratios right."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megacore.bench import report
from megacore.bench.harness import alternate, comparison, slowest_rank


class Clock:
    """A clock that the sides move on by themselves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def side(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.calls.append(name)
            self.now += seconds

        return call


def test_every_side_is_timed_once_a_round_and_the_order_rotates() -> None:
    clock = Clock()
    sides = {"a": clock.side("a", 1.0), "b": clock.side("b", 2.0), "c": clock.side("c", 3.0)}
    seconds = alternate(sides, rounds=3, warmup=1, clock=lambda: clock.now)
    assert seconds == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [3.0] * 3}
    assert "".join(clock.calls) == "abc" + "bca" + "cab" + "abc"


def test_what_comes_before_a_step_is_not_timed() -> None:
    clock = Clock()
    seconds = alternate({"a": clock.side("a", 1.0)}, 2, 0, before=clock.side("wait", 50.0), clock=lambda: clock.now)
    assert seconds == {"a": [1.0, 1.0]}
    assert clock.calls == ["wait", "a"] * 2


def test_ratios_above_one_mean_that_ours_is_faster() -> None:
    result = comparison("step", "ours", {"ours": [1.0, 2.0, 4.0], "theirs": [3.0, 3.0, 4.0]}, {})
    ratio = result.ratio("theirs")
    assert ratio.best == pytest.approx(3.0)
    assert ratio.median == pytest.approx(1.5)
    assert ratio.rounds == pytest.approx(1.5)
    assert ratio.rounds_quartiles == pytest.approx((1.25, 2.25))
    assert list(result.ratios()) == ["theirs"]


def test_a_step_ends_with_its_slowest_rank() -> None:
    assert slowest_rank([{"a": [1.0, 5.0]}, {"a": [2.0, 3.0]}]) == {"a": [2.0, 5.0]}


def test_a_comparison_without_our_side_is_refused() -> None:
    with pytest.raises(ValueError, match="'ours' was not timed; timed were theirs"):
        comparison("step", "ours", {"theirs": [1.0]}, {})


def test_results_are_written_as_json_and_csv(tmp_path: Path) -> None:
    result = comparison("step", "ours", {"ours": [1.0, 2.0], "theirs": [3.0, 3.0]}, {"threads": 1})
    as_json, as_csv = report.write(tmp_path / "new", "train", [result], report.machine())
    stored = json.loads(as_json.read_text())
    assert stored["machine"].keys() >= {"date", "commit", "cpu", "cores", "versions"}
    assert stored["machine"]["versions"]["torch"]
    assert stored["comparisons"][0]["ratios"]["theirs"]["best"] == 3.0
    rows = list(csv.DictReader(as_csv.open()))
    assert [(row["side"], float(row["best_s"]), row["ours_faster_best"]) for row in rows] == [
        ("ours", 1.0, ""),
        ("theirs", 3.0, "3.0"),
    ]


def test_the_table_names_settings_sides_and_ratios() -> None:
    text = report.table([comparison("step", "ours", {"ours": [1.0], "theirs": [3.0]}, {"threads": 1})])
    assert "step (threads 1)" in text
    assert "3.00x best" in text
