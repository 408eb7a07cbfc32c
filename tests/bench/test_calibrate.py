"""`megacore bench calibrate`: how calls are timed, what is measured, and how it is shown."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megacore.bench.calibrate import Point, collectives, timed
from megacore.bench.calibrate_command import SIZES, measure, plan
from megacore.bench.calibrate_report import table, write
from megacore.bench.machine_file import base_of, machine_file
from megacore.cost.machine import find_machine
from megacore.exits import run as run_command
from megacore.mesh.rank_info import RankInfo
from tests.pool import WorkerPool

CPU = torch.device("cpu")


class Clock:
    """A clock that calls move, by what each takes."""

    def __init__(self, takes: list[float]) -> None:
        self.now, self.takes, self.calls = 0.0, takes, 0

    def __call__(self) -> float:
        return self.now

    def work(self) -> None:
        self.now += self.takes[min(self.calls, len(self.takes) - 1)]
        self.calls += 1


def test_a_call_takes_what_its_best_sample_took() -> None:
    slow = Clock([9.0, 9.0, 1.0, 3.0, 2.0, 4.0])  # two to warm up, one to see how long it takes, then samples
    assert timed(slow.work, CPU, samples=3, clock=slow) == 2.0
    quick = Clock([1e-3])
    assert timed(quick.work, CPU, samples=2, clock=quick) == pytest.approx(1e-3)
    assert quick.calls == 3 + 2 * 20  # short ones are repeated until a sample lasts


def test_what_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("cpu", None, None) == ("cpu", ["fp32"], [2, 4])
    for words, told in (
        (["--dtype", "fp8"], "--dtype=fp8 is not measured; use one of fp32, bf16"),
        (["--device", "cpu", "--machine", "mine.toml"], "a CPU is none of the known a100-40gb"),
        (["--device", "cpu", "--ranks", "1"], "--ranks=1: collectives are between 2 ranks or more"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "torch finds no GPU here")]),
    ):
        assert run_command("megacore.tools.bench", ["calibrate", *words]) == 2
        assert told in capsys.readouterr().err


def test_all_is_measured_on_processes_of_its_own_and_shown(tmp_path: Path) -> None:
    asked: list[tuple[str, int]] = []

    @contextmanager
    def ranks(what: str, number: int, name: str, *told: Any) -> Iterator[Path]:
        asked.append((what.partition(":")[2], number))
        if what.endswith("measure_together"):
            points = [
                {
                    "what": "all_reduce",
                    "dtype": "fp32",
                    "sizes": [size // 4],
                    "seconds": 1e-3,
                    "num_bytes": size,
                    "ranks": number,
                }
                for size in told[1]
            ]
        else:
            points = [
                {
                    "what": "gemm",
                    "dtype": "fp32",
                    "sizes": [8, 8, 8],
                    "seconds": 1e-6,
                    "flops": 1024.0,
                    "threads": told[2],
                }
            ]
        path = tmp_path / "result.json"
        path.write_text(json.dumps(points))
        yield path

    points = measure(argparse.Namespace(device="cpu", dtype=None, ranks=[2, 3], rounds=3, machine=None), ranks)
    assert asked[-2:] == [("measure_together", 2), ("measure_together", 3)]
    assert {name for name, _ in asked[:-2]} == {"measure_alone"}
    assert len(points) == len(asked) - 2 + 2 * len(SIZES)
    shown = table(points)
    assert "8 x 8 x 8" in shown
    assert "1.0" in shown  # 1024 FLOPs in a microsecond
    paths = write(tmp_path, "calibrate", points, {"cpu": "one"})
    assert len(paths[1].read_text().splitlines()) == 1 + len(points)
    assert json.loads(paths[0].read_text())["points"][0]["gflop_per_s"] == pytest.approx(1.024)


def points_of_rank(rank: int, world: int) -> list[Point]:
    return list(collectives(RankInfo(rank, world, rank, world), CPU, (1 << 10,), rounds=2))


def test_collectives_are_timed_by_the_slowest_rank(pool: WorkerPool) -> None:
    first, second = pool.run(points_of_rank, 2, 2)
    assert [point.what for point in first] == ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]
    assert all(point.ranks == 2 and point.num_bytes == 1 << 10 and point.seconds > 0 for point in first)
    assert first == second


def test_a_machine_file_says_what_was_measured(tmp_path: Path) -> None:
    base = base_of("NVIDIA H100 80GB HBM3")
    peak, bandwidth = base.accelerator.bf16 * 1e12, base.accelerator.memory_gb_per_s * 1e9
    points = (
        Point("gemm", "bf16", (8, 8, 8), 1e12 / (0.6 * peak), flops=1e12),
        Point("gemm", "bf16", (1, 1, 1), 1.0, flops=1.0),
        Point("attention", "bf16", (1,), 1e12 / (0.4 * peak), flops=1e12),
        Point("copy", "bf16", (1,), 1e9 / (0.8 * bandwidth), num_bytes=1e9),
        Point("call", "fp32", (8,), 7e-6),
        Point("all_reduce", "fp32", (256,), 14 * 5e-6, num_bytes=1024, ranks=8),
        Point("all_reduce", "fp32", (1 << 28,), 2 * 7 / 8 * (1 << 30) / 300e9, num_bytes=1 << 30, ranks=8),
    )
    path = tmp_path / "mine.toml"
    path.write_text(machine_file(points, base))
    machine = find_machine(str(path))
    reached = machine.reached
    assert (reached.gemm, reached.attention, reached.memory) == pytest.approx((0.6, 0.4, 0.8))
    assert (reached.host_us, machine.node.gb_per_s, machine.node.latency_us) == pytest.approx((7.0, 300.0, 5.0))
    assert machine.network == base.network, "what was not measured stays"
    assert machine.accelerator == base.accelerator
