"""The tokenising benchmark measures what it says, on a small corpus."""

import pytest

from megacore.bench.data_tokenize import BASELINE, CASES, VOCAB_SIZE, measure, texts_of


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=lambda case: case.name)
def test_both_sides_are_timed(case):
    pytest.importorskip(case.library)
    found = measure(case, rounds=2, max_bytes=500_000)
    assert len(found.side("prepare").seconds) == len(found.side(BASELINE).seconds) == 2
    assert found.ratio(BASELINE).median > 0
    assert found.settings["vocabulary"] == VOCAB_SIZE and 0.3 < found.settings["megabytes"] <= 0.6


def test_shapes_of_the_corpus():
    by_shape = {case.documents: texts_of(case, 500_000) for case in CASES}
    assert len(by_shape["one"]) == 1 < len(by_shape["files"]) < len(by_shape["lines"])
