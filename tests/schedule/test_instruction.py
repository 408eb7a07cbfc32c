"""Instructions as text, and as rows of a table."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacore.schedule import Instruction, Instructions, Op, Schedule
from megacore.schedule.instruction import COMPUTE, EXAMPLES, FORMS, MESSAGES, RECEIVES, SENDS

NUMBERS = st.integers(0, 2**31 - 1)
USES = {
    Op.PAIR: ("stage", "microbatch", "back_stage", "back_microbatch"),
    **dict.fromkeys(MESSAGES, ("stage", "microbatch", "peer")),
    Op.REDUCE: ("stage",),
    Op.TIED: ("stage", "peer"),
    Op.GATHER: ("stage", "unit"),
    Op.FREE: ("stage", "unit"),
    Op.OPTIMIZE: (),
}
INSTRUCTIONS = st.sampled_from(Op).flatmap(
    lambda op: st.fixed_dictionaries(dict.fromkeys(USES.get(op, ("stage", "microbatch")), NUMBERS)).map(
        lambda numbers: Instruction(op, **numbers)
    )
)


@given(INSTRUCTIONS)
def test_what_is_written_is_read_back(instruction: Instruction) -> None:
    assert Instruction.parse(str(instruction)) == instruction


@given(st.lists(INSTRUCTIONS))
def test_a_table_is_the_sequence_that_it_was_made_of(sequence: list[Instruction]) -> None:
    table = Instructions.of(sequence)
    assert list(table) == sequence
    assert [table[i] for i in range(len(table))] == sequence
    assert Instructions.parse(str(table)) == table
    assert list(table[1:]) == sequence[1:]
    assert list(table.having(*COMPUTE)) == [each for each in sequence if each.op in COMPUTE]


def test_every_op_has_a_form_of_its_own() -> None:
    examples = [Instruction.parse(word) for word in EXAMPLES.split()]
    assert " ".join(map(str, examples)) == EXAMPLES
    assert [each.op for each in examples] == list(Op) == list(FORMS)


def test_what_the_letters_mean() -> None:
    assert Instruction.parse("FB0.3:7.1") == Instruction(Op.PAIR, 0, 3, back_stage=7, back_microbatch=1)
    assert Instruction.parse("RG1.3<2") == Instruction(Op.RECEIVE_GRADIENT, 1, 3, peer=2)
    assert Instruction.parse("T0~3") == Instruction(Op.TIED, 0, peer=3)
    assert Instruction.parse("X4.2") == Instruction(Op.FREE, 4, unit=2)


def test_each_send_has_its_receive() -> None:
    """Lowering counts on the order."""
    assert [send + 1 for send in SENDS] == list(RECEIVES)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "F",
            "F0",
            "F0.",
            "f0.1",
            " F0.1",
            "F0.1 ",
            "F-1.0",
            "F00.1",
            "F0.01",
            "F0.1>2",
            "F0.2147483648",
            "F\u0661.0",
        ),
        *("SA0.1", "SA0.1<2", "RA0.1>2", "FB0.1", "FB0.1:2", "B0.1:2.3"),
        *("R", "R0.1", "T0", "T0>1", "G0", "O0", "Y0.1"),
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        Instruction.parse(text)
    assert str(caught.value) == f"{text!r} is not an instruction; write one of {EXAMPLES}"


def test_a_table_is_known_by_what_it_holds() -> None:
    one, same, other = (Instructions.parse(text) for text in ("F0.0 B0.0", "F0.0 B0.0", "F0.0 B0.1"))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != "F0.0 B0.0"
    assert repr(one) == "Instructions(2)"
    assert str(Instructions.of([])) == ""


def test_columns() -> None:
    table = Instructions.parse("F0.3 FB1.3:2.1 SA1.3>4 O")
    assert table.table.dtype == np.int32
    assert table.op.tolist() == [Op.FORWARD, Op.PAIR, Op.SEND_ACTIVATION, Op.OPTIMIZE]
    assert table.stage.tolist() == [0, 1, 1, -1]
    assert table.microbatch.tolist() == [3, 3, 3, -1]
    assert table.peer.tolist() == [-1, -1, 4, -1]
    assert table.back_stage.tolist() == [-1, 2, -1, -1]
    assert table.back_microbatch.tolist() == [-1, 1, -1, -1]


def test_a_schedule_knows_its_stages() -> None:
    schedule = Schedule("x", 1, tuple(map(Instructions.parse, ("F0.0 F3.0 B3.0 B0.0", "FB1.0:1.0", ""))))
    assert (schedule.num_ranks, schedule.num_stages) == (3, 4)
    assert schedule.home == (0, 1, -1, 0)
    assert schedule.trains
    assert not Schedule("x", 1, (Instructions.parse("F0.0"),)).trains
    assert Schedule("x", 1, (Instructions.parse(""),)).home == ()
