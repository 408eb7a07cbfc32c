"""Batches: the same samples whatever the dp size, and ramps as Megatron grows them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacore.data.sampler import Batch, BatchPlan


def test_constant_batches() -> None:
    plan = BatchPlan(8, 2)
    assert plan.batch(1) == Batch(0, 8) and plan.batch(5) == Batch(32, 8)
    assert plan.microbatches(2, dp_rank=1, dp_size=2) == [(10, 2), (14, 2)]
    assert plan.num_samples(3) == 24


ramps = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(1, 400))


@settings(deadline=None, max_examples=80)
@given(ramps, st.integers(1, 3))
def test_ramp_is_the_rule(shape: tuple[int, int, int, int], micro: int) -> None:
    start, increment, num, samples = shape[0] * micro, shape[1] * micro, shape[2], shape[3]
    full = start + num * increment
    plan = BatchPlan(full, micro, (start, increment, samples))
    consumed = 0
    for step in range(1, 200):
        # Megatron: the batch has grown int(consumed / (samples / num)) times, and is full once `samples` are consumed
        size = full if consumed > samples else start + consumed * num // samples * increment
        assert plan.batch(step) == Batch(consumed, min(size, full))
        assert {plan.step_at(ordinal) for ordinal in range(consumed, consumed + plan.batch(step).size)} == {step}
        consumed += plan.batch(step).size
    assert len(plan.stages) <= num + 1


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("ramp", [(), (8, 8, 50)])
def test_no_sample_is_lost_or_repeated(dp_size: int, ramp: tuple[int, ...]) -> None:
    plan = BatchPlan(32, 2, ramp)
    plan.check(dp_size)
    seen: list[int] = []
    for step in range(1, 8):
        batch = plan.batch(step)
        dealt = [plan.microbatches(step, rank, dp_size) for rank in range(dp_size)]
        firsts = [first for share in dealt for first, _ in share]
        assert sorted(firsts) == list(range(batch.first_ordinal, batch.first_ordinal + batch.size, 2))
        for rank, share in enumerate(dealt):
            assert share == sorted(share)
            assert all((first - batch.first_ordinal) // 2 % dp_size == rank for first, _ in share)
        seen += [first + i for first in sorted(firsts) for i in range(2)]
    assert seen == list(range(len(seen)))


BAD = [
    ((7, 2, ()), "global_batch_size=7 is not a multiple"),
    ((8, 2, (2, 2)), "three positive numbers"),
    ((8, 2, (2, 2, 0)), "three positive numbers"),
    ((8, 2, (16, 2, 5)), "does not lead to"),
    ((8, 2, (2, 4, 5)), "does not lead to"),
    ((9, 3, (3, 2, 5)), "an increment of 2, not a multiple of"),
]


@pytest.mark.parametrize("arguments, message", BAD)
def test_refused(arguments: tuple[int, int, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchPlan(*arguments)


def test_dp_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="global_batch_size=8 is not a multiple of .*dp=2.3=6; use 6 or 12"):
        BatchPlan(8, 2).check(3)
    with pytest.raises(ValueError, match="batch_ramp=.* has a start of 4, not a multiple of .*dp=2.4=8"):
        BatchPlan(8, 2, (4, 4, 10)).check(4)
    with pytest.raises(AssertionError, match="cannot be dealt out"):
        BatchPlan(8, 2).num_microbatches(1, 3)
    with pytest.raises(ValueError, match="from 1"):
        BatchPlan(8, 2).batch(0)
