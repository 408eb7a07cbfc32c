"""Schedules as text: what is written is read back, and what cannot be read is told with its line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacore.schedule import Instructions, Schedule
from megacore.schedule.generators.generate import KINDS, generate
from megacore.schedule.lower import lower
from megacore.schedule.text import from_text, to_text


@given(st.sampled_from(list(KINDS)), st.integers(1, 4), st.integers(1, 9), st.booleans())
def test_what_is_written_is_read_back(kind: str, p: int, m: int, whole: bool) -> None:
    schedule = generate(kind, p, m)
    schedule = lower(schedule, tied=True) if whole else schedule
    assert from_text(to_text(schedule), kind) == schedule


def test_what_it_looks_like() -> None:
    assert to_text(generate("1f1b", 2, 2)) == (
        "# 1f1b: 2 ranks, 2 microbatches\n0: F0.0 F0.1 B0.0 B0.1\n1: F1.0 B1.0 F1.1 B1.1\n"
    )
    assert to_text(Schedule("x", 1, (Instructions.parse("F0.0 G0.2"), Instructions.parse("")))) == (
        "# x: 2 ranks, 1 microbatches\n0: F0.0 G0.2\n1:\n"
    )


def test_it_can_be_written_by_hand() -> None:
    text = """
        # first what goes through
        1 :F1.0 F1.1   # the head
        0: F0.0

        0: F0.1
        1:B1.0 B1.1
        0: B0.0\tB0.1
        2:
    """
    schedule = from_text(text)
    assert (schedule.kind, schedule.num_microbatches) == ("file", 2)
    assert list(map(str, schedule.ranks)) == ["F0.0 F0.1 B0.0 B0.1", "F1.0 F1.1 B1.0 B1.1", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0: F0.0 B0.0\n1: F1.0 C1.0", "line 2: 'C1.0' is not an instruction; write one of F0.3 B0.3"),
        ("0: F0.0 B0.0\n\nF1.0 B1.0", "line 3: 'F1.0 B1.0' begins with no rank; write \"0: F0.0 B0.0\""),
        ("0: F0.0\n-1: F1.0", "line 2: '-1: F1.0' begins with no rank"),
        ("01: F0.0", "line 1: '01: F0.0' begins with no rank"),
        ("0: F0.0\n2: F1.0\n2: B1.0", "line 2: rank 2, but rank 1 has no line"),
        ("999999: F0.0", "line 1: rank 999999, but rank 0 has no line"),
        ("0: F0.0 F0.1\n0: B7.0", "line 2, B7.0: all ranks together have 2 forwards, so no number can be that high"),
        ("0: F0.0 F0.2000000000", "line 1, F0.2000000000: all ranks together have 2 forwards"),
        ("0: FB0.0:2.0", "line 1, FB0.0:2.0: all ranks together have 1 forwards"),
        ("", 'line 1: no rank forwards anything; write "0: F0.0 B0.0"'),
        ("# nothing", "line 1: no rank forwards anything"),
        ("0: B0.0", "line 1: no rank forwards anything"),
        ("0: O", "line 1: no rank forwards anything"),
    ],
)
def test_what_cannot_be_read_is_told(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        from_text(text)
    assert str(caught.value).startswith(message)


@given(st.text("0123 :.#FBIWOSARGTX<>~\n", max_size=60))
def test_any_text_is_a_schedule_or_told(text: str) -> None:
    try:
        schedule = from_text(text)
    except ValueError as error:
        assert str(error).startswith("line ")
    else:
        assert from_text(to_text(schedule)) == schedule
