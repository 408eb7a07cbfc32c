"""The index benchmark runs, compares like with like, and says so where there is nothing to compare with."""

from pathlib import Path

import numpy as np
import pytest

from megacore.bench import data_index
from megacore.bench.baselines.megatron_core import open_package
from megacore.bench.data_index import Case, measure, oracle_build, our_build, write_corpus

TINY = Case("tiny", 300, 20, 32, 1.5)


def test_all_sides_are_timed() -> None:
    if not open_package():
        pytest.skip("megatron-core is not installed")
    result = measure(TINY, rounds=2)
    assert [side.name for side in result.sides] == ["megacore", "megatron", "arrays", "megatron-core"]
    assert all(len(side.seconds) == 2 and side.best > 0 for side in result.sides)
    assert result.ratio("megatron-core").best > 0


def test_the_same_samples_are_built(tmp_path: Path) -> None:
    if not open_package():
        pytest.skip("megatron-core is not installed")
    tokens = write_corpus(tmp_path / "data", TINY)
    prefix, wanted = str(tmp_path / "data"), int(tokens * TINY.epochs) // TINY.seq_len
    theirs = oracle_build(prefix, TINY, wanted, tmp_path / "theirs")()
    ours = our_build(prefix, "megatron", TINY, wanted, tmp_path / "ours")()
    assert np.array_equal(ours.indices[0].samples, theirs.sample_index)  # type: ignore[attr-defined]
    assert np.array_equal(ours.indices[0].shuffle, theirs.shuffle_index)  # type: ignore[attr-defined]


def test_without_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_index, "open_package", lambda: False)
    with pytest.raises(ValueError, match="megatron-core is not installed.*pip install"):
        measure(TINY, rounds=1)
