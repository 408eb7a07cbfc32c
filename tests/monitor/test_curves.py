"""Loss curves: the series, the drawing in a terminal, the picture."""

import math
import sys
from dataclasses import replace

import pytest

from megacore.monitor.console import colourful, visible_width
from megacore.monitor.curves import curves_of, nice_ticks, read_curves, smooth, terminal_curve
from megacore.monitor.metrics import MetricsWriter, StepMetrics


def run(steps=200):
    def loss(step):
        return 4 + 4 * math.exp(-step / 30)

    return [
        StepMetrics(
            step, loss(step), 1.0, 1e-3, step * 100, val_loss=loss(step) + 0.1 if step % 50 == 0 else None
        ).record()
        for step in range(1, steps + 1)
    ]


def test_series_skip_what_is_not_finite_and_take_a_repeated_step_once():
    records = run(3) + [
        StepMetrics(3, math.nan, math.inf, 1e-3, 900).record(),
        StepMetrics(2, 7.0, 2.0, 1e-3, 250).record(),
    ]
    curves = curves_of(records)
    assert [step for step, _ in curves.loss] == [1, 2]
    assert curves.loss[1] == (2, 7.0)
    assert curves.tokens == 900
    assert curves.val_loss == []


def test_reading_a_run(tmp_path):
    with pytest.raises(ValueError, match="holds no steps"):
        read_curves(tmp_path)
    MetricsWriter(tmp_path).write(StepMetrics(1, 2.5, None, 1e-3, 10))
    assert read_curves(tmp_path).loss == [(1.0, 2.5)]


def test_smoothing_keeps_lines_straight_and_means_noise():
    line = [(float(step), 2.0 * step) for step in range(50)]
    assert smooth(line, 10)[:40] == line[:40]
    noise = [(float(step), (-1.0) ** step) for step in range(101)]
    assert max(abs(value) for _, value in smooth(noise, 20)[10:]) < 0.11
    assert smooth(line, 0) == line
    assert smooth([], 5) == []


@pytest.mark.parametrize(
    ("low", "high", "count", "ticks"),
    [
        (0, 10, 5, [0, 2, 4, 6, 8, 10]),
        (3.9, 8.4, 5, [4, 5, 6, 7, 8]),
        (0.1, 0.2, 4, [0.1, 0.125, 0.15, 0.175, 0.2]),
        (5, 5, 3, [5]),
    ],
)
def test_ticks_are_round(low, high, count, ticks):
    assert nice_ticks(low, high, count) == pytest.approx(ticks)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_terminal_curve_fits_and_falls(width):
    curves = curves_of(run())
    lines = terminal_curve(replace(curves, val_loss=[]), width=width, height=12)
    assert max(map(visible_width, lines[:-1])) <= width + 2
    canvas = [line[7:] for line in lines[:12]]
    tops = [
        min((row for row in range(12) if canvas[row][column : column + 1].strip()), default=None)
        for column in range(width)
    ]
    drawn = [row for row in tops if row is not None]
    assert drawn[0] == 0 and drawn[-1] == 11 and drawn == sorted(drawn)
    assert len(drawn) >= width - 10
    assert {line[:7].strip(" ┤") for line in lines[:12]} >= {"5", "6", "7"}
    marked = terminal_curve(curves, width=width, height=12)
    assert sum(line.count("◆") for line in marked[:12]) == 4
    assert "training loss 7.87 → 4.0" in marked[-1] and "validation 4.1" in marked[-1]


def test_colours_change_nothing_but_colour():
    curves = curves_of(run())
    assert [visible_width(line) for line in terminal_curve(curves, paint=colourful)] == [
        len(line) for line in terminal_curve(curves)
    ]


@pytest.mark.parametrize(
    "records",
    [run(1), [StepMetrics(5, 3.0, None, 0.0, 1).record()] * 2, [StepMetrics(1, math.nan, None, 0.0, 1).record()]],
)
def test_tiny_and_flat_runs_draw(records):
    assert terminal_curve(curves_of(records))


@pytest.mark.parametrize("records", [run(), run(1), [StepMetrics(1, math.nan, None, 0.0, 1).record()]])
def test_picture(tmp_path, records):
    image = pytest.importorskip("matplotlib.image")
    from megacore.monitor.plots import save_loss_plot

    save_loss_plot(curves_of(records), tmp_path / "new" / "loss.png", "title", "tp=2 × dp=2")
    pixels = image.imread(tmp_path / "new" / "loss.png")
    assert pixels.shape[:2] == (960, 1376)
    assert pixels[..., :3].std() > 0.02


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    from megacore.monitor.plots import save_loss_plot

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r'pip install "megacore\[plots\]"'):
        save_loss_plot(curves_of(run(3)), tmp_path / "loss.png", "title")
