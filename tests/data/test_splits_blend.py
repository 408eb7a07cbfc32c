"""Splits by Megatron's rule, and mixtures that keep their weights at every length."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacore.data.blend import (
    MAX_PERIOD,
    Blend,
    build_megatron_blend,
    integer_shares,
    megatron_sizes,
    temperature_weights,
)
from megacore.data.splits import split_bounds, split_range


def test_split_golden() -> None:
    assert split_bounds((969.0, 30.0, 1.0), 1000) == [(0, 969), (969, 999), (999, 1000)]
    assert split_bounds((1.0,), 7) == [(0, 7), (7, 7), (7, 7)]
    assert split_bounds((0.5, 0.5), 5) == [(0, 2), (2, 5), (5, 5)]  # 2.5 rounds to the even 2


@given(st.lists(st.integers(0, 100), min_size=1, max_size=3).filter(any), st.integers(0, 10_000))
def test_splits_cover_everything_once(shares: list[int], num: int) -> None:
    ranges = split_bounds(shares, num)
    assert ranges[0][0] == 0 and ranges[2][1] == num
    assert all(before[1] == after[0] for before, after in zip(ranges, ranges[1:]))


def test_empty_split_names_the_fix() -> None:
    with pytest.raises(ValueError, match="none of the 12 documents .* corpus of 35 documents or more, .*eval_blend"):
        split_range((969.0, 30.0, 1.0), 12, "valid", "corpus")
    with pytest.raises(
        ValueError, match="--documents paragraph .else a file is one document., or raise the train share"
    ):
        split_range((1.0, 99.0), 1, "train", "corpus")
    assert split_range((969.0, 30.0, 1.0), 35, "valid", "corpus") == (34, 35)
    with pytest.raises(ValueError, match="give valid a share above 0"):
        split_range((1.0,), 12, "valid", "corpus")
    for bad in ((), (1.0, -1.0), (0.0, 0.0), (1.0, 1.0, 1.0, 1.0)):
        with pytest.raises(ValueError, match="data.split"):
            split_bounds(bad, 5)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 400))
def test_blend_keeps_its_weights(weights: list[int], length: int) -> None:
    blend = Blend([float(weight) for weight in weights])
    served = [0] * len(weights)
    for ordinal in range(length):
        dataset, sample = blend.pick(ordinal)
        assert sample == served[dataset]
        served[dataset] += 1
    assert served == blend.counts(length)
    for count, weight in zip(served, weights, strict=True):
        assert abs(count - length * weight / sum(weights)) < len(weights)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=40))
def test_shares(weights: list[float]) -> None:
    shares = integer_shares(weights)
    assert shares.min() >= 1 and shares.sum() <= MAX_PERIOD
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share / shares.sum() - weight / sum(weights)) <= (len(weights) + 1) / MAX_PERIOD


def test_decimal_weights_are_exact() -> None:
    assert integer_shares([0.7, 0.3]).tolist() == [7, 3]
    assert integer_shares([2.0, 0.0, 2.0]).tolist() == [1, 0, 1]


def test_far_ordinals() -> None:
    blend = Blend([0.7, 0.2, 0.1])
    far = 10**15
    assert sorted(blend.pick(far + i)[0] for i in range(10)) == [0] * 7 + [1] * 2 + [2]
    assert blend.counts(far) == [7 * 10**14, 2 * 10**14, 10**14]


@pytest.mark.parametrize("weights", [[], [-1.0, 2.0], [0.0, 0.0], [float("nan")], [float("inf"), 1.0]])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="data.blend"):
        Blend(weights)


def test_temperature() -> None:
    assert temperature_weights([100, 300], 1.0) == pytest.approx([0.25, 0.75])
    assert temperature_weights([100, 400], 2.0) == pytest.approx([1 / 3, 2 / 3])
    assert temperature_weights([1, 10**12], 1e9) == pytest.approx([0.5, 0.5])


def test_megatron_blend_golden() -> None:
    arrays = build_megatron_blend([0.5, 0.3, 0.2], 10)
    assert arrays["datasets"].tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0]
    assert arrays["samples"].tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4]
    assert megatron_sizes([0.5, 0.3, 0.2], 1000) == [503, 302, 201]
