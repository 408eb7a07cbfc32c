"""Simulated schedules against the formulas of the papers, for many sizes and durations.

A formula holds where its paper draws it: in full pipelines (``m`` no smaller than said below), without cost of
communication, and with halves of a backward whose weight part is not the longest. P0001 ... number the published
formulas. f, b, w: forward, input gradient, weight gradient of one chunk; t = b + w; r: a rank, from 0.

Published, but of schedules that are none of our kinds: P0014 and P0015 (V-Half, V-Min), P0018 (DualPipe, two copies
of the parameters). P0009 and P0020 are about FLOPs and names.
"""

from itertools import product

import numpy as np
import pytest

from megacore.cost.simulate import Durations, simulate
from megacore.cost.timeline import Timeline
from megacore.schedule.generators.generate import generate
from megacore.schedule.instruction import Op
from megacore.schedule.live import peak_activations
from megacore.schedule.schedule import Instructions

RANKS = (1, 2, 3, 4, 5, 8)
# (f, b, w): w <= f and 2 w <= f + b
TIMES = ((1, 1, 1), (1, 1.25, 0.75), (1, 2, 0.5), (2, 3, 1.5), (1, 1, 0), (3, 5, 3), (0.7, 1.9, 0.3))


def run(kind: str, p: int, m: int, v: int = 0, f: float = 1, b: float = 1, w: float = 1) -> Timeline:
    return simulate(generate(kind, p, m, v), Durations(forward=f, backward=b + w, input_grad=b, weight_grad=w))


def over_ideal(timeline: Timeline) -> float:
    """Bubble over the time of work, both of one rank."""
    work = timeline.busy(0)
    return (timeline.makespan - work) / work


def microbatches(p: int, least: int) -> tuple[int, ...]:
    return (least, least + 1, 2 * least + 1, 5 * p)


@pytest.mark.parametrize(("p", "times"), [*product(RANKS, TIMES)])
def test_gpipe(p, times):
    f, b, w = times
    for m in microbatches(p, 1):
        timeline = run("gpipe", p, m, 0, *times)
        assert timeline.makespan - timeline.busy(0) == pytest.approx((p - 1) * (f + b + w))  # P0001
        assert over_ideal(timeline) == pytest.approx((p - 1) / m)
        assert timeline.bubble_fraction == pytest.approx((p - 1) / (m + p - 1))
        assert peak_activations(timeline.schedule) == (m,) * p


@pytest.mark.parametrize(("p", "times"), [*product(RANKS, TIMES)])
def test_1f1b(p, times):
    f, b, w = times
    for m in microbatches(p, 1):
        timeline = run("1f1b", p, m, 0, *times)
        assert timeline.makespan - timeline.busy(0) == pytest.approx((p - 1) * (f + b + w))  # P0002, P0005, P0016
        assert over_ideal(timeline) == pytest.approx((p - 1) / m)
        assert timeline.bubble_fraction == pytest.approx((p - 1) / (m + p - 1))  # P0010
        assert peak_activations(timeline.schedule) == tuple(min(p - r, m) for r in range(p))


@pytest.mark.parametrize(("p", "v", "times"), [*product(RANKS, (2, 3, 5), TIMES)])
def test_interleaved(p, v, times):
    for rounds in (1, 2, 3, 5):
        timeline = run("interleaved", p, m := rounds * p, v, *times)
        # P0003 counts in times of a rank's whole layers, v chunks; P0004 is the same. (One chunk is plain 1F1B here.)
        assert timeline.makespan - timeline.busy(0) == pytest.approx((p - 1) * sum(times))
        assert over_ideal(timeline) == pytest.approx((p - 1) / (v * m))
        assert timeline.bubble_fraction == pytest.approx(1 - 1 / (1 + (p - 1) / (v * m)))
        peak = peak_activations(timeline.schedule)[0]
        assert peak == pytest.approx(p * (1 + (p - 1) / (p * v)) if rounds > 1 else p)


def largest_together(rank: Instructions, activations: float, weight_inputs: float) -> float:
    """The most that a rank keeps of microbatches forwarded but not taken back, and of those that await W."""
    steps = np.select(
        [rank.op == Op.FORWARD, rank.op == Op.INPUT_GRAD, rank.op == Op.WEIGHT_GRAD],
        [activations, weight_inputs - activations, -weight_inputs],
    )
    return float(np.cumsum(steps).max())


@pytest.mark.parametrize(("p", "times"), [*product(RANKS, TIMES)])
def test_zb_h1(p, times):
    f, b, w = times
    for m in microbatches(p, p):
        timeline = run("zb-h1", p, m, 0, *times)
        # P0006; P0017 says the same with the whole backward t: f + t - 2 w.
        assert max(timeline.rank_idle) == pytest.approx((p - 1) * (f + b - w))
        assert timeline.rank_idle[0] == max(timeline.rank_idle)
        assert peak_activations(timeline.schedule) == tuple(range(p, 0, -1))
        for r, rank in enumerate(timeline.schedule.ranks):
            assert largest_together(rank, 1.0, 0.5) == (p - r) + 0.5 * r
        # P0011: a third of 1F1B's where all three times are equal.
        if f == b == w:
            total = run("1f1b", p, m).makespan
            assert timeline.rank_idle[0] == pytest.approx((p - 1) / (m + p - 1) / 3 * total)


@pytest.mark.parametrize(("p", "times"), [*product(RANKS, TIMES)])
def test_zb_h2(p, times):
    f, b, w = times
    for m in microbatches(p, 2 * p - 1):
        timeline = run("zb-h2", p, m, 0, *times)
        assert max(timeline.rank_idle) == pytest.approx((p - 1) * (f + b - 2 * w))  # P0007; P0012: 0 if all are equal
        assert peak_activations(timeline.schedule) == tuple(2 * (p - r) - 1 for r in range(p))
        for r, rank in enumerate(timeline.schedule.ranks):
            assert largest_together(rank, 1.0, 0.5) == (2 * (p - r) - 1) + 0.5 * (2 * r)


@pytest.mark.parametrize(("p", "unit"), [*product(RANKS, (1, 0.3, 7))])
def test_zb_v(p, unit):
    for m in microbatches(p, 2 * p - 1):
        timeline = run("zb-v", p, m, 0, unit, unit, unit)
        assert max(timeline.rank_idle) == pytest.approx(0, abs=1e-9)  # P0008, P0013
        assert max(peak_activations(timeline.schedule)) == p


@pytest.mark.parametrize(("p", "unit", "w"), [*product(RANKS, (1, 0.3, 7), (1, 0.75, 0.2, 0))])
def test_dualpipe_v(p, unit, w):
    # P0019 for 2 p stages on p ranks: (p - 1)(FB + t - 3 w), FB being the time of a pair. The published order of
    # instructions gives it where f = b and a pair takes as long as its parts; otherwise its idle time is another one.
    for m in microbatches(p, 2 * p):
        timeline = run("dualpipe-v", p, m, 0, unit, unit, w * unit)
        pair, t = unit + unit + w * unit, unit + w * unit
        assert max(timeline.rank_idle) == pytest.approx((p - 1) * (pair + t - 3 * w * unit), abs=1e-9)
        # 2 p + 1 chunks', of which a rank has two
        assert max(peak_activations(timeline.schedule)) == p + 1 / 2
