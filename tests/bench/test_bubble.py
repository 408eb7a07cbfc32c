"""`megacore bench bubble` runs the real engine on stages that only sleep."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megacore.bench import bubble_report, sleeping
from megacore.bench.bubble import CASES, Bubble, run_once, sleeping_engine
from megacore.bench.sleeping import Seconds
from megacore.mesh.mesh import ParallelMesh
from megacore.schedule.schedule import Instructions, Schedule
from megacore.tools import bench

FORWARD, INPUT, WEIGHT = 3.0, 2.0, 1.0
LIST = "F0.0 F1.0 I1.0 I0.0 W1.0 W0.0 F0.1 F1.1 B1.1 B0.1 R0 R1 O"


def test_stages_sleep_as_long_as_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(sleeping, "time", SimpleNamespace(sleep=slept.append))
    schedule, mesh = Schedule("file", 2, (Instructions.parse(LIST),)), ParallelMesh.single()
    timeline = run_once(sleeping_engine(schedule, Seconds(FORWARD, INPUT, WEIGHT), mesh), schedule, mesh)
    whole = [INPUT, WEIGHT]
    assert slept == [FORWARD] * 2 + [INPUT] * 2 + [WEIGHT] * 2 + [FORWARD] * 2 + whole + whole
    assert len(timeline.start[0]) == len(schedule.ranks[0])


def test_every_schedule_is_there_at_two_and_four_ranks() -> None:
    names = {f"{kind}-pp{pp}" for kind in ("1f1b", "gpipe", "interleaved", "zb-h1", "zb-h2") for pp in (2, 4)}
    assert {case.name for case in CASES} == names | {
        f"{kind}-pp{pp}" for kind in ("zb-v", "dualpipe-v") for pp in (2, 4)
    }


@pytest.mark.parametrize("case", ["1f1b-pp2", "zb-v-pp2", "dualpipe-v-pp4"])
def test_a_case_runs_and_is_kept(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    how = ["--milliseconds", "2", "2", "2", "--microbatches", "4", "--rounds", "2"]
    assert bench.main(["bubble", "--case", case, *how, "--json", "--output", str(tmp_path)]) == 0
    shown = json.loads(capfd.readouterr().out)
    (bubble,) = shown["bubbles"]
    assert bubble["name"] == case and bubble["rounds"] == 2
    assert 0 < bubble["predicted"] < 1 and 0 < bubble["median"] < 1
    assert json.loads((tmp_path / "bubble.json").read_text()) == shown
    (row,) = csv.DictReader((tmp_path / "bubble.csv").open())
    assert row["pipeline"] == case and float(row["error"]) == bubble["error"]


def test_the_error_is_a_share_of_the_prediction() -> None:
    bubble = Bubble("1f1b-pp2", 0.2, 0.001, (0.21, 0.22, 0.29), {"processes": 2})
    assert bubble.error == pytest.approx(0.1)
    text = bubble_report.table([bubble, Bubble("1f1b-pp4", 0.4, 0.001, (0.36,), {"processes": 4})])
    assert "1f1b-pp2  1.00 ms      20.00   21.50  22.00  25.50   +10.0%" in text and "-10.0%" in text
    assert "processes" not in text, "only settings that all share stand above"


def test_durations_that_nothing_can_take_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--milliseconds=2.0 0.0 2.0 must all be greater than 0"):
        bench.main(["bubble", "--milliseconds", "2", "0", "2"])
    with pytest.raises(ValueError, match="--microbatches=0 must be at least 1"):
        bench.main(["bubble", "--microbatches", "0"])
