"""Learning rates at their corners and between them."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megacore.config.resolve import resolve_optim
from megacore.config.schema import OptimConfig
from megacore.optim.learning_rate import learning_rate

KINDS = ("cosine", "linear", "constant", "wsd", "inverse_sqrt")
STEPS = 100


def rates(kind: str, warmup: int = 10, **more: float | int) -> list[float]:
    """Of steps 1 to STEPS; index 0 is no step."""
    optim = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=warmup, lr_schedule=kind, **more)
    resolved = resolve_optim(optim, STEPS)
    return [math.nan] + [learning_rate(resolved, step) for step in range(1, STEPS + 51)]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_is_a_straight_line_to_the_peak(kind: str) -> None:
    rate = rates(kind)
    assert rate[1:11] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rate[11] <= rate[10] == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_without_warm_up_the_first_step_is_at_or_near_the_peak(kind: str) -> None:
    rate = rates(kind, warmup=0)
    assert 1 - 0.9 / STEPS <= rate[1] <= 1.0


def test_cosine() -> None:
    rate = rates("cosine")
    assert rate[55] == pytest.approx(0.55)  # half-way
    assert rate[10 + 30] == pytest.approx(0.1 + 0.9 * 0.75)  # cos 60 degrees
    assert rate[100:] == pytest.approx([0.1] * 51)


def test_linear() -> None:
    rate = rates("linear")
    assert rate[10:101] == pytest.approx([1 - 0.9 * i / 90 for i in range(91)])
    assert rate[100:] == pytest.approx([0.1] * 51)


def test_constant() -> None:
    assert rates("constant")[10:] == [1.0] * 141


def test_warm_up_stable_decay() -> None:
    rate = rates("wsd", wsd_decay_steps=20)
    assert rate[10:81] == [1.0] * 71
    assert rate[80:101] == pytest.approx([1 - 0.9 * i / 20 for i in range(21)])
    assert rate[100:] == pytest.approx([0.1] * 51)
    assert rates("wsd")[90:101] == pytest.approx([1 - 0.09 * i for i in range(11)])  # a tenth by default
    assert rates("wsd", wsd_decay_steps=1000)[10:101] == pytest.approx(rates("linear")[10:101])  # not before its peak


def test_inverse_square_root() -> None:
    rate = rates("inverse_sqrt")
    assert rate[40] == pytest.approx(0.5)
    assert rate[90] == pytest.approx(1 / 3)
    optim = OptimConfig(lr=1.0, min_lr=0.25, warmup_steps=10, lr_schedule="inverse_sqrt")
    assert learning_rate(resolve_optim(optim, STEPS), 10**6) == 0.25


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_the_decay_may_end_before_the_run(kind: str) -> None:
    rate = rates(kind, decay_steps=50)
    assert rate[49] > 0.1
    assert rate[50:] == pytest.approx([0.1] * 101)


@given(
    kind=st.sampled_from(KINDS),
    warmup=st.integers(0, 80),
    decay=st.integers(0, 300),
    wsd=st.integers(0, 100),
    low=st.floats(0, 1),
    total=st.integers(1, 200),
)
def test_any_schedule_stays_between_its_bounds_and_never_rises_or_jumps_after_its_peak(
    kind: str, warmup: int, decay: int, wsd: int, low: float, total: int
) -> None:
    assume(warmup <= (decay or total))
    optim = OptimConfig(
        lr=1.0, min_lr=low, warmup_steps=warmup, decay_steps=decay, wsd_decay_steps=wsd, lr_schedule=kind
    )
    resolved = resolve_optim(optim, total)
    rate = [learning_rate(resolved, step) for step in range(1, 301)]
    assert rate[:warmup] == pytest.approx([step / warmup for step in range(1, warmup + 1)])
    after = ([1.0] if warmup else []) + rate[warmup:]
    assert all(low - 1e-12 <= value <= 1.0 for value in after)
    falls = [a - b for a, b in zip(after, after[1:])]
    assert all(fall >= -1e-12 for fall in falls)
    end = decay or total
    length = end - warmup
    if kind == "wsd":
        length = min(length, wsd or max(1, end // 10))
    slope = (1 - low) / max(1, length)
    steepest = {"constant": 0.0, "cosine": math.pi / 2 * slope, "inverse_sqrt": 1 / max(1, warmup)}
    assert max(falls) <= steepest.get(kind, slope) + 1e-12
