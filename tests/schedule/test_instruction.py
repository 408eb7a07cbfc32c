"""Instructions as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacore.schedule import Instruction, Op

numbers = st.integers(0, 10**6)
instructions = st.one_of(
    st.builds(Instruction, st.sampled_from([Op.FORWARD, Op.BACKWARD]), numbers, numbers),
    st.builds(Instruction, st.just(Op.REDUCE), numbers),
    st.just(Instruction(Op.OPTIMIZE)),
)


@given(instructions)
def test_what_is_written_is_read_back(instruction: Instruction) -> None:
    assert Instruction.parse(str(instruction)) == instruction


@pytest.mark.parametrize("text", ["F0.3", "B12.0", "R7", "O"])
def test_what_is_read_is_written_back(text: str) -> None:
    assert str(Instruction.parse(text)) == text


@pytest.mark.parametrize("text", ["", "F", "F0", "F0.", "R", "R0.1", "O0", "X0.1", "f0.1", " F0.1", "F0.1 ", "F-1.0"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an instruction; write F0.3, B0.3, R0 or O"):
        Instruction.parse(text)
