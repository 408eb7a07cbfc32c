"""Our order of samples against a slow, obvious version, and its promises: nothing lost, nothing repeated, no state."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacore.data import native, sample_index
from megacore.data.cache import IndexCache
from megacore.data.counter import permutation_keys
from megacore.data.sample_index import SampleIndex


def no_message(text: str) -> None:
    raise AssertionError(text)


def make_index(lengths: list[int], seq_len: int, seed: int = 1, folder: str = "unused") -> SampleIndex:
    cache = IndexCache(folder, no_message)
    return SampleIndex(np.array(lengths, np.int32), 100, seq_len, seed, "train", "data", cache)


def expand(pieces: np.ndarray) -> list[tuple[int, int]]:
    return [(sequence, offset + i) for sequence, offset, length in pieces.tolist() for i in range(length)]


def slow_stream(lengths: list[int], seed: int, epochs: int) -> list[tuple[int, int]]:
    """All epochs laid end to end: (sequence, offset) of every token."""
    stream: list[tuple[int, int]] = []
    for epoch in range(epochs):
        keys = permutation_keys(len(lengths), seed, "train", "sequences", epoch)
        for sequence in native.loops.permute(len(lengths), keys, 0, len(lengths)).tolist():
            stream += [(100 + sequence, offset) for offset in range(lengths[sequence])]
    return stream


lengths_strategy = st.lists(st.integers(0, 30), min_size=1, max_size=30).filter(any)


@settings(deadline=None, max_examples=60)
@given(lengths_strategy, st.integers(1, 40), st.integers(0, 5))
def test_samples_are_the_stream_cut_and_shuffled(lengths: list[int], seq_len: int, seed: int) -> None:
    index, epochs = make_index(lengths, seq_len, seed), 4
    tokens = sum(lengths)
    stream = slow_stream(lengths, seed, epochs + 2 + (seq_len + 1) // tokens)
    for epoch in range(epochs):
        first, last = index.epoch_samples(epoch)
        places = []
        for sample in range(first, last):
            place, found = index.source(sample)
            places.append(place)
            assert found == epoch
            assert expand(index.locate(sample)) == stream[place * seq_len : place * seq_len + seq_len + 1]
        assert sorted(places) == list(range(first, last))
        assert all(epoch * tokens <= place * seq_len < (epoch + 1) * tokens for place in places)


@settings(deadline=None, max_examples=30)
@given(lengths_strategy, st.integers(1, 20))
def test_every_token_is_a_target_once_per_epoch(lengths: list[int], seq_len: int) -> None:
    """Over seq_len epochs, which end where a sample ends, each is a target seq_len times (the first once less)."""
    index, tokens = make_index(lengths, seq_len), sum(lengths)
    counts: dict[tuple[int, int], int] = {}
    for sample in range(tokens):  # tokens * seq_len targets = seq_len epochs
        for place in expand(index.locate(sample))[1:]:
            counts[place] = counts.get(place, 0) + 1
    assert sum(counts.values()) == tokens * seq_len
    uneven = {place: count for place, count in counts.items() if count != seq_len}
    assert len(counts) >= tokens - 1 and len(uneven) <= 2 and sum(abs(c - seq_len) for c in uneven.values()) <= 2


def test_epochs_differ_and_seeds_differ() -> None:
    lengths = [8] * 200
    orders = {
        (seed, epoch): tuple(expand(make_index(lengths, 16, seed).locate(100 * epoch + i))[0] for i in range(100))
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4


def test_any_sample_at_any_time() -> None:
    lengths = np.random.default_rng(0).integers(0, 50, 700).tolist()
    straight, jumping = make_index(lengths, 32), make_index(lengths, 32)
    expected = [straight.locate(sample).tolist() for sample in range(2000)]
    for sample in np.random.default_rng(1).permutation(2000)[:300].tolist():
        assert jumping.locate(sample).tolist() == expected[sample]
    assert len(expand(straight.locate(10**12))) == 33  # millions of epochs away, at once


def test_one_huge_document() -> None:
    index = make_index([10_000_019], 128)
    first, last = index.epoch_samples(0)
    assert (first, last) == (0, 78_126)
    starts = [expand(index.locate(sample))[0][1] for sample in range(50)]
    assert starts != sorted(starts) and all(start % 128 == 0 for start in starts)


def test_a_million_short_documents(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(0, 20, 1_000_000)
    index = make_index(lengths.tolist(), 512, folder=str(tmp_path))
    pieces = index.locate(0)
    assert pieces[:, 2].sum() == 513 and len(pieces) > 30
    assert index.table(0)[-1] == lengths.sum()


def test_no_tokens() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        make_index([0, 0], 4)


def test_large_tables_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_index, "CACHED_FROM", 10)
    lengths = list(range(1, 40))
    expected = make_index(lengths, 8, folder=str(tmp_path)).locate(3).tolist()
    assert len(list(tmp_path.glob("*/table.npy"))) == 1

    def never(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(SampleIndex, "_build", never)
    assert make_index(lengths, 8, folder=str(tmp_path)).locate(3).tolist() == expected
