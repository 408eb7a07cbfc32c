"""Predictions for `megacore bench layouts`: between measured points is interpolated, and ranks share cores."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megacore.bench.calibrate import Point
from megacore.bench.layout_model import Priced, Prices, Work, combined, interpolated, predict, within_a_step
from megacore.bench.layouts_command import predict as predict_trials
from megacore.bench.layouts_command import resolved
from megacore.config.schema import RunConfig
from megacore.mesh.group import CommRecord
from megacore.train.pipeline_overview import Pipeline
from tests.bench.test_layouts_bench import small
from tests.engine.common import run_config

SPEED, BANDWIDTH, CALL = 1e11, 1e10, 1e-6


def prices(cores: int = 2) -> Prices:
    """A machine of round figures, whose collectives take a millisecond per rank and byte/s of 1e9."""
    gemm = [Point("gemm", "fp32", (n, n, n), 2 * n**3 / SPEED, flops=2 * n**3) for n in (8, 512)]
    attention = [Point(f"attention{end}", "fp32", (1,), 1e-3, flops=1e8) for end in ("", "_with_backward")]
    rest = [Point("add", "fp32", (1,), 1e6 / BANDWIDTH, num_bytes=1e6), Point("call", "fp32", (8,), CALL)]
    together = [
        Point(what, "fp32", (1,), 1e-3 * ranks + size / 1e9, num_bytes=size, ranks=ranks)
        for what in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
        for ranks in (2, 4)
        for size in (1e3, 1e6)
    ]
    return Prices((*gemm, *attention, *rest, *together), cores)


def test_between_points_times_are_straight_in_logarithms() -> None:
    curve = [(10.0, 1.0), (1000.0, 100.0), (1000.0, 300.0)]
    assert interpolated(curve, 1.0) == 1.0
    assert interpolated(curve, 100.0) == pytest.approx((1.0 * 200.0) ** 0.5)
    assert interpolated(curve, 1000.0) == 200.0
    assert interpolated(curve, 3000.0) == 600.0


def test_operations_are_priced_by_what_they_do() -> None:
    a, b, c, w = (torch.empty(shape, device="meta") for shape in ((500, 500), (500, 16), (500, 16), (16, 500)))
    flops = 2 * 500 * 500 * 16
    for name, call, calls, seconds in (
        ("mm", lambda: a @ b, 1, flops / SPEED),
        ("addmm", lambda: torch.addmm(c, a, b), 1, flops / SPEED),
        ("mm of a transposed view", lambda: torch.nn.functional.linear(a, w), 2, flops / SPEED),
        ("add", lambda: a + a, 1, 3 * a.nbytes / BANDWIDTH),
        ("view", lambda: a.view(-1), 1, 0.0),
    ):
        with Priced(prices()) as priced:
            call()
        assert priced.seconds == pytest.approx(calls * CALL + seconds), name


def run_of(world: int, *overrides: str) -> RunConfig:
    return run_config(
        world, "train.micro_batch_size=1", "train.global_batch_size=8", "precision.dtype=fp32", *overrides
    )


def test_ranks_share_the_cores() -> None:
    work = Work(1.0, ())

    def time(works: Sequence[Work], alike: int, cores: int, *overrides: str) -> float:
        config = run_of(alike * len(works), *overrides)
        return combined(config, works, alike, Pipeline.of(config), prices(cores))

    assert time([work], 1, 2) == pytest.approx(1.0)
    assert time([work], 2, 2) == pytest.approx(1.0)
    assert time([work], 4, 2) == pytest.approx(2.0), "four ranks on two cores take turns"
    assert time([work], 4, 4) == pytest.approx(1.0)
    two = time([work, work], 1, 2, "parallel.pp=2", "model.num_layers=4", "parallel.stage_layers=[2,2]")
    assert two == pytest.approx(1 + 1 / 8, rel=0.1), "a bubble of one microbatch in eight"
    alone = time([work, work], 1, 1, "parallel.pp=2", "model.num_layers=4", "parallel.stage_layers=[2,2]")
    assert alone == pytest.approx(2.0, rel=0.05), "on one core the bubble is filled by the other rank"
    summed = Work(1.0, ((CommRecord("dp_cp", "all_reduce", 250_000, torch.float32), 2, 3.0),))
    assert time([summed], 2, 2) == pytest.approx(1.0 + 3 * (2e-3 + 1e-3))


def test_collectives_take_the_points_of_as_many_ranks() -> None:
    of = prices().collective
    assert of("all_reduce", 2, 1e6) == pytest.approx(3e-3)
    assert of("all_gather", 4, 1e6) == pytest.approx(5e-3)
    assert of("broadcast", 64, 1e6) == pytest.approx(5e-3)


def test_a_step_in_tensor_parallel_sends_more_than_one_in_data_parallel() -> None:
    times = {
        name: predict(run_of(2, *overrides), 2, prices(), longer=1.0)
        for name, overrides in {"tp": ("parallel.tp=2",), "dp": ()}.items()
    }
    assert times["tp"] > 2 * times["dp"] > 0


def test_points_are_read_from_the_file_of_calibrate(tmp_path: Path) -> None:
    from megacore.bench.calibrate_report import write
    from megacore.bench.layout_trials import trials_of

    known = prices()
    step = Point("step", "fp32", (8, 256), 1.0)
    path, *_ = write(tmp_path, "calibrate", (*known.points, step), {"cores": 2})
    read = Prices.read(path)
    assert read == Prices((*known.points, step), 2)
    trials = trials_of(small(), "tp=1;tp=2", "sizes", 2)
    predicted = predict_trials(trials, str(path))
    longer = within_a_step(read)
    assert predicted["tp=2"] == pytest.approx(predict(resolved(trials[1]), 2, read, longer))
    assert predict_trials(trials, None) == {}
    path.write_text(json.dumps({"points": []}))
    with pytest.raises(ValueError, match="is not what `megacore bench calibrate --output` writes"):
        Prices.read(path)
    with pytest.raises(ValueError, match="cannot be read"):
        Prices.read(tmp_path / "none.json")
