"""The compiled loops and their numpy twins against slow, obvious Python."""

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacore.data import fallback, native
from megacore.data.counter import draws, hash_key, mix64, permutation_keys, uniform

BACKENDS = [fallback] + ([native.loops] if native.loops is not fallback else [])
both = pytest.mark.parametrize("loops", BACKENDS, ids=lambda loops: loops.__name__.rsplit(".", 1)[-1])
lengths_strategy = st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(any)


def unaligned(values: list[int]) -> np.ndarray:
    """int32 two bytes off, as in a mapped .idx."""
    return np.frombuffer(b"xx" + np.array(values, "<i4").tobytes(), "<i4", offset=2)


def test_the_reason_is_kept() -> None:
    assert native.REASON == "compiled" or "pip install" in native.REASON


def slow_permutation(size: int, keys: list[int]) -> list[int]:
    """The Feistel network with Python's integers."""
    left_size = next(a for a in range(1, size + 1) if a * a >= size)
    right_size = -(-size // left_size)

    def below(value: int, bound: int) -> int:
        return ((int(mix64(np.array([value % 2**64], np.uint64))[0]) >> 32) * bound) >> 32

    def once(value: int) -> int:
        left, right = divmod(value, right_size)
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            left = (left + below(right + even, left_size)) % left_size
            right = (right + below(left + odd, right_size)) % right_size
        return left * right_size + right

    result = []
    for index in range(size):
        value = once(index)
        while value >= size:
            value = once(value)
        result.append(value)
    return result


@both
@pytest.mark.parametrize("size", [1, 2, 3, 5, 12, 100])
def test_permutation_is_the_one_described(loops: ModuleType, size: int) -> None:
    keys = permutation_keys(size, "test", size)
    expected = slow_permutation(size, keys.tolist())
    assert sorted(expected) == list(range(size))
    assert loops.permute(size, keys, 0, size).tolist() == expected
    assert loops.permute(size, keys, size // 2, size - size // 2).tolist() == expected[size // 2 :]


@both
@pytest.mark.parametrize("size", [1023, 1024, 65536, 200_003])
def test_permutation_is_one(loops: ModuleType, size: int) -> None:
    order = loops.permute(size, permutation_keys(size, 3), 0, size)
    assert np.array_equal(np.sort(order), np.arange(size))
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 5 / np.sqrt(size)


def test_permutations_of_huge_ranges_agree() -> None:
    size = 2**61 + 12345
    keys = permutation_keys(size, 9)
    results = [loops.permute(size, keys, 2**60, 50).tolist() for loops in BACKENDS]
    assert all(result == results[0] for result in results)
    assert len(set(results[0])) == 50 and all(0 <= value < size for value in results[0])


@pytest.mark.parametrize("size", [3, 10])
def test_every_place_is_equally_likely(size: int) -> None:
    rounds = 4000
    counts = np.zeros((size, size))
    for seed in range(rounds):
        counts[np.arange(size), native.loops.permute(size, permutation_keys(size, seed), 0, size)] += 1
    expected = rounds / size
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    freedom = (size - 1) ** 2
    assert chi_squared < freedom + 6 * np.sqrt(2 * freedom)


@both
def test_bad_arguments(loops: ModuleType) -> None:
    keys = permutation_keys(5, 1)
    for arguments in ((0, keys, 0, 0), (5, keys, 0, 6), (5, keys, -1, 2)):
        with pytest.raises(ValueError, match="must lie"):
            loops.permute(*arguments)
    with pytest.raises(ValueError, match="outside"):
        loops.sample_index(unaligned([1, 2]), np.array([0, 2], np.int32), 4, 1, 1)
    table = loops.epoch_table(unaligned([3, 4]), permutation_keys(2, 1), 1)
    with pytest.raises(ValueError, match="within the epoch"):
        loops.locate(table, unaligned([3, 4]), permutation_keys(2, 1), 1, 5, 3)


@both
@settings(deadline=None, max_examples=60)
@given(lengths=lengths_strategy, stride=st.integers(1, 5), seed=st.integers(0, 99), data=st.data())
def test_table_and_locate(loops: ModuleType, lengths: list[int], stride: int, seed: int, data) -> None:
    keys = permutation_keys(len(lengths), seed)
    order = loops.permute(len(lengths), keys, 0, len(lengths)).tolist()
    stream = [(sequence, offset) for sequence in order for offset in range(lengths[sequence])]
    table = loops.epoch_table(unaligned(lengths), keys, stride)
    before = [sum(lengths[sequence] for sequence in order[:place]) for place in range(0, len(order), stride)]
    assert table.tolist() == [*before, len(stream)]
    start = data.draw(st.integers(0, len(stream) - 1))
    count = data.draw(st.integers(0, len(stream) - start))
    pieces = loops.locate(table, unaligned(lengths), keys, stride, start, count)
    expanded = [(s, offset + i) for s, offset, length in pieces.tolist() for i in range(length)]
    assert expanded == stream[start : start + count]
    assert (pieces[:, 2] > 0).all()


def slow_sample_index(lengths: list[int], documents: list[int], seq_len: int, num: int, extra: int) -> list[list[int]]:
    """The rule, word for word."""
    rows, position, offset = [[0, 0]], 0, 0
    for _ in range(num):
        missing = seq_len + extra
        while True:
            length = lengths[documents[position]] - offset
            missing -= length
            if missing <= 0:
                offset += missing + length - extra
                break
            if position == len(documents) - 1:
                offset = lengths[documents[position]] - extra
                break
            position, offset = position + 1, 0
        rows.append([position, offset])
    return rows


@both
@settings(deadline=None, max_examples=80)
@given(lengths_strategy, st.integers(1, 3), st.integers(1, 12), st.integers(0, 1), st.randoms())
def test_sample_index(loops: ModuleType, lengths: list[int], epochs: int, seq_len: int, extra: int, random) -> None:
    documents = list(range(len(lengths))) * epochs
    random.shuffle(documents)
    num = (sum(lengths) * epochs - extra) // seq_len
    ours = loops.sample_index(unaligned(lengths), np.array(documents, np.int32), seq_len, num, extra)
    assert ours.dtype == np.int32
    assert ours.tolist() == slow_sample_index(lengths, documents, seq_len, num, extra)


@both
def test_last_sample_may_be_partial(loops: ModuleType) -> None:
    rows = loops.sample_index(unaligned([3, 4]), np.array([1, 0], np.int32), 4, 2, 1)
    assert rows.tolist() == slow_sample_index([3, 4], [1, 0], 4, 2, 1)


@both
@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any))
def test_blend_pattern(loops: ModuleType, shares: list[int]) -> None:
    datasets, samples = loops.blend_pattern(np.array(shares, np.int64))
    period, counts = sum(shares), [0] * len(shares)
    for i, (dataset, sample) in enumerate(zip(datasets.tolist(), samples.tolist(), strict=True)):
        behind = [share * (i + 1) - count * period for share, count in zip(shares, counts, strict=True)]
        assert dataset == behind.index(max(behind)) and sample == counts[dataset]
        counts[dataset] += 1
    assert counts == shares


@both
@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.integers(0, 200))
def test_blend_megatron(loops: ModuleType, weights: list[float], size: int) -> None:
    datasets, samples = loops.blend_megatron(np.array(weights), size)
    counts = [0] * len(weights)
    for i in range(size):
        behind = [weight * max(i, 1) - count for weight, count in zip(weights, counts, strict=True)]
        assert datasets[i] == behind.index(max(behind)) and samples[i] == counts[datasets[i]]
        counts[datasets[i]] += 1


@both
@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 9), max_size=20), st.lists(st.integers(0, 5), max_size=5), st.integers(0, 3), st.data())
def test_scan(loops: ModuleType, lengths: list[int], parts: list[int], fault: int, data) -> None:
    offsets = [2 * sum(lengths[:i]) for i in range(len(lengths))]
    bounds = [0, *sorted(min(part, len(lengths)) for part in parts), len(lengths)]
    sound = (unaligned(lengths), np.array(offsets, np.int64), np.array(bounds, np.int64), 2)
    assert loops.scan(*sound)[:3] == (-1, -1, -1)
    assert len({other.scan(*sound)[3] for other in BACKENDS}) == 1
    place = data.draw(st.integers(0, len(lengths) - 1)) if lengths else 0
    if fault == 0 and lengths:
        lengths[place] = -1
        assert loops.scan(unaligned(lengths), *sound[1:])[0] == place
    elif fault == 1 and lengths:
        offsets[place] += 2
        assert loops.scan(sound[0], np.array(offsets, np.int64), *sound[2:])[1] == place
    elif fault == 2:
        place = data.draw(st.integers(0, len(bounds) - 1))
        bounds[place] = -1
        found = [other.scan(*sound[:2], np.array(bounds, np.int64), 2)[2] for other in BACKENDS]
        assert found == [place] * len(BACKENDS)
    else:
        found = [other.scan(*sound[:2], np.array([*bounds, len(lengths) + 1], np.int64), 2) for other in BACKENDS]
        assert all(one == found[0] for one in found) and found[0][2] == len(bounds)


def test_scan_hash_sees_order() -> None:
    def content(lengths: list[int]) -> int:
        offsets = np.cumsum([0, *lengths[:-1]], dtype=np.int64)
        return native.loops.scan(unaligned(lengths), offsets, np.array([0, len(lengths)], np.int64), 1)[3]

    assert len({content(lengths) for lengths in ([1, 2, 3], [2, 1, 3], [3, 2, 1], [1, 2, 4], [6], [1, 2, 3, 0])}) == 6


@both
@pytest.mark.parametrize("dtype", [np.int32, np.uint32])
def test_shuffle_is_that_of_numpy(loops: ModuleType, dtype: type) -> None:
    ours, theirs = np.random.RandomState(7), np.random.RandomState(7)
    for size in (0, 1, 2, 3, 31, 32, 33, 1000, 65_537):
        values, expected = np.arange(size, dtype=dtype), np.arange(size)
        name, state, position, *_ = ours.get_state(legacy=True)
        ours.set_state((name, state, loops.shuffle(values, state, position)))
        theirs.shuffle(expected)
        assert np.array_equal(values, expected)
    assert ours.randint(10**9) == theirs.randint(10**9)


def test_counter_is_stable() -> None:
    """Frozen values: if they change, every run's order changes."""
    assert hash_key(1234, "train", "samples", 0) == 3722758396977528092
    assert hash_key(1, 2) != hash_key(2, 1)
    assert hash_key("ab") != hash_key("a", "b")
    assert np.array_equal(draws(5, 3), draws(5, 9)[:3])
    values = uniform(draws(hash_key("u"), 100_000))
    assert 0 <= values.min() and values.max() < 1 and abs(values.mean() - 0.5) < 0.005
    order = native.loops.permute(10, permutation_keys(10, 1234, "train"), 0, 10)
    assert order.tolist() == [3, 4, 7, 6, 1, 9, 0, 5, 8, 2]
