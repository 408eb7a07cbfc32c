"""Document boundaries and fill-in-the-middle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacore.data.documents import IGNORE, document_numbers, document_positions, document_starts, labels_of
from megacore.data.fim import FillInMiddle, FimTokens

EOD = 0


def test_boundaries_by_hand() -> None:
    text = np.array([5, 6, 0, 7, 0, 0, 8, 9])
    starts = document_starts(text, np.array([3, 4, 1]), EOD)  # pieces meet after the first EOD and before the 9
    assert document_numbers(starts).tolist() == [0, 0, 0, 1, 1, 2, 3, 4]
    assert document_positions(starts).tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert labels_of(text, None).tolist() == [6, 0, 7, 0, 0, 8, 9]
    assert labels_of(text, EOD).tolist() == [6, IGNORE, 7, IGNORE, IGNORE, 8, 9]


def test_without_eod_pieces_are_documents() -> None:
    starts = document_starts(np.arange(5), np.array([2, 3]), None)
    assert document_numbers(starts).tolist() == [0, 0, 1, 1, 1]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_boundaries_one_by_one(text: list[int]) -> None:
    starts = document_starts(np.array(text), np.array([len(text)]), EOD)
    number = position = 0
    for place in range(len(text)):
        if place:
            new = text[place - 1] == EOD
            number, position = (number + 1, 0) if new else (number, position + 1)
        assert document_numbers(starts)[place] == number and document_positions(starts)[place] == position


MARKS = FimTokens(prefix=1000, middle=1001, suffix=1002)


def fim(rate: float = 1.0, spm_rate: float = 0.5, seed: int = 3, eod: int | None = EOD) -> FillInMiddle:
    return FillInMiddle(MARKS, rate, spm_rate, eod, seed, "train")


def apply(rule: FillInMiddle, text: list[int], ordinal: int) -> list[int]:
    values = np.array(text, np.int64)
    rule.apply(values, document_starts(values, np.array([len(text)]), rule.eod), ordinal)
    return values.tolist()


def undo(document: list[int]) -> list[int]:
    """The text that a rearranged document was made of."""
    prefix, middle, suffix = (document.index(mark) for mark in (1000, 1001, 1002))
    assert prefix == 0 and suffix < middle
    if suffix == 1:  # SPM, or PSM with an empty prefix: the same tokens
        before, end = document[middle + 1 :], document[2:middle]
        joined = sorted(before)
        return joined + end if before == joined else []
    return document[1:suffix] + document[middle + 1 :] + document[suffix + 1 : middle]


@settings(deadline=None, max_examples=60)
@given(st.integers(6, 40), st.integers(0, 10**6), st.sampled_from([0.0, 1.0]))
def test_a_document_keeps_its_tokens(length: int, ordinal: int, spm_rate: float) -> None:
    document = list(range(1, length + 1))
    result = apply(fim(spm_rate=spm_rate), [*document, EOD], ordinal)
    assert len(result) == length + 1 and result[-1] == EOD
    assert undo(result[:-1]) == document[:-3]
    assert (result[1] == 1002) or spm_rate == 0.0


def test_documents_stay_in_their_places() -> None:
    documents = [list(range(10, 30)), list(range(40, 44)), list(range(50, 80))]
    text = [token for document in documents for token in [*document, EOD]]
    result = apply(fim(), text, 7)
    assert [i for i, token in enumerate(result) if token == EOD] == [i for i, token in enumerate(text) if token == EOD]
    assert undo(result[:20]) == documents[0][:-3]
    assert result[21:25] == documents[1]  # too short to rearrange
    assert undo(result[26:56]) == documents[2][:-3]


def test_choices_are_reproducible_and_follow_the_rates() -> None:
    text = list(range(1, 60))
    assert apply(fim(), text, 5) == apply(fim(), text, 5)
    assert len({tuple(apply(fim(), text, ordinal)) for ordinal in range(20)}) > 10
    assert apply(fim(seed=4), text, 5) != apply(fim(), text, 5)
    assert apply(fim(rate=0.0), text, 5) == text
    results = [apply(fim(rate=0.4, spm_rate=0.25), text, ordinal) for ordinal in range(2000)]
    changed = [result for result in results if result != text]
    assert len(changed) / 2000 == pytest.approx(0.4, abs=0.05)
    assert sum(result[1] == 1002 for result in changed) / len(changed) == pytest.approx(0.26, abs=0.06)


def test_whole_sample_without_eod() -> None:
    result = apply(fim(eod=None), list(range(1, 33)), 0)
    assert len(result) == 32 and undo(result) == list(range(1, 30))
