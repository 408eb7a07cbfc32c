"""Failures, money and deadlines: against simulation, against published figures, and at the edges."""

import math
import random

import pytest

from megacore.cost.economics import MTBF_HOURS, bill, failures, goodput, gpus_for, interval
from megacore.cost.machine import find_machine
from megacore.cost.planning import read_wish

KEYS = ["parallel.tp=8", "parallel.pp=4", "parallel.zero=1", "train.global_batch_size=128"]


@pytest.fixture(scope="module")
def found():
    return read_wish(None, "llama2-70b", KEYS, 128, find_machine("h100")).estimate()


def lived(work, stall, restart, mtbf, segments, rng):
    """The share of work when failures really come at random, during saves and restarts too."""
    time, done, left = 0.0, 0, rng.expovariate(1 / mtbf)
    while done < segments:
        need = work + stall
        if left >= need:
            left -= need
            time += need
            done += 1
            continue
        time += left
        left = rng.expovariate(1 / mtbf)
        while left < restart:
            time += left
            left = rng.expovariate(1 / mtbf)
        left -= restart
        time += restart
    return done * work / time


@pytest.mark.parametrize(("work", "stall", "restart", "mtbf"), [(600, 30, 300, 3600), (300, 5, 60, 20000)])
def test_goodput_is_what_random_failures_leave(work, stall, restart, mtbf):
    seen = lived(work, stall, restart, mtbf, 30_000, random.Random(7))
    assert goodput(work, stall, restart, mtbf) == pytest.approx(seen, rel=0.02)


@pytest.mark.parametrize(("stall", "mtbf"), [(5.0, 10_000.0), (60.0, 7_200.0), (120.0, 1_000.0)])
def test_the_interval_is_the_best(stall, mtbf):
    best = goodput(interval(stall, mtbf), stall, 300, mtbf)
    for factor in (0.3, 0.5, 0.8, 1.25, 2.0, 3.0):
        assert goodput(interval(stall, mtbf) * factor, stall, 300, mtbf) <= best * 1.0005


def test_failures_come_as_llama_3s_did(found):
    assert MTBF_HOURS / 16384 == pytest.approx(54 * 24 / 466)
    lasting = failures(found)
    assert lasting.mtbf_s == pytest.approx(MTBF_HOURS * 3600 / 128)
    assert 0.98 < lasting.goodput < 1
    assert failures(found, mtbf_hours=100).goodput < lasting.goodput
    assert failures(found, save_s=30).interval_steps > failures(found, save_s=1).interval_steps


def test_a_bill_adds_up(found):
    lasting = failures(found)
    paid = bill(found, 2e12, 4.0, lasting)
    assert paid.steps == math.ceil(2e12 / (128 * 4096))
    assert paid.gpu_hours == pytest.approx(paid.days * 24 * 128)
    assert paid.cost == pytest.approx(4 * paid.gpu_hours)
    assert paid.days == pytest.approx(paid.steps * found.step.seconds / 86400 / lasting.goodput, rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "price", "said"), [(0, 1, "--tokens=0"), (math.nan, 1, "--tokens=nan"), (1e9, -1, "--price=-1")]
)
def test_bills_that_make_no_sense(found, tokens, price, said):
    with pytest.raises(ValueError, match=said):
        bill(found, tokens, price, failures(found))


def test_gpus_for_a_deadline():
    fewest, tried = gpus_for(10.0, 1e12, 8, 1 << 16, lambda number: 2000 / number)
    assert 200 <= fewest <= 224
    assert tried[fewest] <= 10 < tried[max(number for number in tried if number < fewest)]
    assert gpus_for(0.001, 1e12, 8, 1024, lambda number: 2000 / number)[0] == 0
    assert gpus_for(1000.0, 1e12, 8, 1024, lambda number: 2000 / number)[0] == 8
    with pytest.raises(ValueError, match="--deadline=-1"):
        gpus_for(-1.0, 1e12, 8, 1024, lambda number: 1.0)
