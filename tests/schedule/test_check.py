"""What the checker takes, what it refuses and how it says so. That it is right is shown by ``test_mutants``."""

import time

import pytest

from megacore.schedule import Instruction, Instructions, Op, Schedule
from megacore.schedule.check import check
from megacore.schedule.generators.generate import generate
from megacore.schedule.lower import lower

FIRST = "F0.0 SA0.0>1 F0.1 SA0.1>1 RG1.0<1 B0.0 RG1.1<1 B0.1 R0 O"
SECOND = "RA0.0<0 F1.0 RA0.1<0 B1.0 SG1.0>0 F1.1 B1.1 SG1.1>0 R1 O"


def read(*ranks: str, num_microbatches: int = 2) -> Schedule:
    return Schedule("test", num_microbatches, tuple(map(Instructions.parse, ranks)))


def refusal(schedule: Schedule, **bounds: list[float]) -> str:
    with pytest.raises(ValueError) as refused:
        check(schedule, **bounds)
    return str(refused.value)


@pytest.mark.parametrize(
    "schedule",
    [
        read("F0.0 B0.0 F0.1 B0.1 R0 O"),
        read("F0.1 F0.0 B0.0 B0.1 R0 O"),
        read("F0.0 I0.0 F0.1 I0.1 W0.0 W0.1 R0 O"),
        read("F0.0 FB0.1:0.0 B0.1 R0 O"),
        read("F0.0 F1.0 B1.0 R1 B0.0 R0 O", num_microbatches=1),
        read("G0.0 F0.0 X0.0 G0.0 B0.0 G0.1 R0 O", num_microbatches=1),
        read("F0.0 F0.1"),
        read("F0.0 SA0.0>1 F0.1 SA0.1>1", "RA0.0<0 F1.0 RA0.1<0 F1.1"),
        read(FIRST, SECOND),
        read(FIRST.replace("O", "T0~1 O"), SECOND.replace("O", "T1~0 O")),
        read(
            "F0.0 SA0.0>1 RA1.0<1 F2.0 B2.0 SG2.0>1 RG1.0<1 B0.0 R2 R0 O",
            "RA0.0<0 F1.0 SA1.0>0 RG2.0<0 B1.0 SG1.0>0 R1 O",
            num_microbatches=1,
        ),
    ],
    ids=lambda schedule: str(schedule.ranks[0]),
)
def test_legal_schedules_are_returned(schedule: Schedule) -> None:
    assert check(schedule) is schedule


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        # Numbers.
        (("F0.2 B0.2 R0 O",), "rank 0, position 0, F0.2: microbatches are 0 to 1"),
        (("F0.0 F0.1 FB0.0:0.2 R0 O",), "rank 0, position 2, FB0.0:0.2: microbatches are 0 to 1"),
        ((FIRST.replace("SA0.1>1", "SA0.1>2"), SECOND), "rank 0, position 3, SA0.1>2: ranks are 0 to 1"),
        (
            (FIRST.replace("SA0.1>1", "SA0.1>0"), SECOND),
            "rank 0, position 3, SA0.1>0: a rank has nothing to send to it",
        ),
        # Stages.
        (("F0.0 F0.1", ""), "rank 1, position 0, end of list: the rank forwards no stage"),
        (("F0.0 F0.1 F2.0",), "rank 0, position 2, F2.0: nobody forwards stage 1, and stages leave no gaps"),
        (("F0.0 F0.1 B1.0",), "rank 0, position 2, B1.0: stages are 0 to 0"),
        (("F0.0 F0.1", "F1.0 F1.1 F0.1"), "rank 1, position 2, F0.1: stage 0 lives on rank 0"),
        ((FIRST, SECOND.replace("R1", "R1 R0")), "rank 1, position 9, R0: stage 0 lives on rank 0"),
        # Once each.
        (("F0.0 F0.1 R0",), "rank 0, position 2, R0: a schedule that takes nothing back may only forward"),
        (
            ("F0.0 B0.0 F0.1 B0.0 R0 O",),
            "rank 0, position 3, B0.0: microbatch 0 of stage 0 is taken back already, by rank 0, position 1, B0.0",
        ),
        (
            ("F0.0 B0.0 W0.0 F0.1 B0.1 R0 O",),
            "rank 0, position 2, W0.0: microbatch 0 of stage 0 is accumulated already, by rank 0, position 1, B0.0",
        ),
        (("F0.0 B0.0 R0 O",), "rank 0, position 4, end of list: F0.1 is missing"),
        (
            ("F0.0 F0.0 B0.0 R0 O",),
            "rank 0, position 1, F0.0: microbatch 0 of stage 0 is forwarded already, by rank 0, ",
        ),
        (("F0.0 F1.0 F1.1",), "rank 0, position 3, end of list: F0.1 is missing"),
        (("F0.0 B0.0 F0.1 R0 O",), "rank 0, position 5, end of list: B0.1 is missing"),
        (("F0.0 B0.0 F0.1 I0.1 R0 O",), "rank 0, position 6, end of list: W0.1 is missing"),
        # Messages.
        ((FIRST.replace("SA0.1>1 ", ""), SECOND), "rank 0, position 9, end of list: SA0.1>1 is missing"),
        ((FIRST, SECOND.replace("RA0.1<0 ", "")), "rank 1, position 9, end of list: RA0.1<0 is missing"),
        ((FIRST.replace("RG1.0<1 ", ""), SECOND), "rank 0, position 9, end of list: RG1.0<1 is missing"),
        ((FIRST, SECOND.replace("SG1.0>0 ", "")), "rank 1, position 9, end of list: SG1.0>0 is missing"),
        ((FIRST, SECOND.replace("R1", "SA1.0>0 R1")), "rank 1, position 8, SA1.0>0: no other rank needs it"),
        ((FIRST.replace("R0", "SG0.1>1 R0"), SECOND), "rank 0, position 8, SG0.1>1: no other rank needs it"),
        (
            (FIRST, SECOND.replace("SG1.1>0", "SG1.0>0")),
            "rank 1, position 7, SG1.0>0: microbatch 0 of stage 1 is sent already, by rank 1, position 4, SG1.0>0",
        ),
        (
            ("F0.0 SA0.0>2 F0.1 SA0.1>1", "RA0.0<0 F1.0 RA0.1<0 F1.1 SA1.0>2 SA1.1>2", "RA1.0<1 F2.0 RA1.1<1 F2.1"),
            "rank 0, position 1, SA0.0>2: rank 1 needs it",
        ),
        (
            ("F0.0 SA0.0>1 F0.1 SA0.1>1", "RA0.0<2 F1.0 RA0.1<0 F1.1 SA1.0>2 SA1.1>2", "RA1.0<1 F2.0 RA1.1<1 F2.1"),
            "rank 1, position 0, RA0.0<2: it comes from rank 0",
        ),
        (
            ("F0.0 F0.1 SA0.1>1 SA0.0>1", "RA0.0<0 F1.0 RA0.1<0 F1.1"),
            "rank 1, position 0, RA0.0<0: what comes next from rank 0 is rank 0, position 2, SA0.1>1",
        ),
        # Order.
        (("B0.0 F0.0 F0.1 B0.1 R0 O",), "rank 0, position 0, B0.0: it needs rank 0, position 1, F0.0"),
        (("FB0.0:0.0 F0.1 B0.1 R0 O",), "rank 0, position 0, FB0.0:0.0: it needs rank 0, position 0, FB0.0:0.0"),
        (("F1.0 F0.0 F0.1 F1.1",), "rank 0, position 0, F1.0: it needs rank 0, position 1, F0.0"),
        (
            ("SA0.0>1 F0.0 F0.1 SA0.1>1", "RA0.0<0 F1.0 RA0.1<0 F1.1"),
            "rank 0, position 0, SA0.0>1: it needs rank 0, position 1, F0.0",
        ),
        (
            (FIRST.replace("RG1.1<1 B0.1", "B0.1 RG1.1<1"), SECOND),
            "rank 0, position 6, B0.1: it needs rank 0, position 7, RG1.1<1",
        ),
        (("F0.0 F0.1 W0.0 I0.0 B0.1 R0 O",), "rank 0, position 2, W0.0: it needs rank 0, position 3, I0.0"),
        (
            ("F0.0 F0.1 B0.1 B0.0 R0 O",),
            "rank 0, position 2, B0.1: a stage's gradients are accumulated in ascending order of microbatch",
        ),
        # Units.
        (("G0.0 F0.0 G0.0 F0.1",), "rank 0, position 2, G0.0: the unit is gathered already"),
        (("G0.0 F0.0 X0.1 F0.1",), "rank 0, position 2, X0.1: the unit is not gathered"),
        # Sums and steps.
        (("F0.0 B0.0 F0.1 R0 B0.1 O",), "rank 0, position 3, R0: it needs rank 0, position 4, B0.1"),
        (("F0.0 B0.0 F0.1 B0.1 R0 R0 O",), "rank 0, position 5, R0: the stage's gradients are summed already"),
        (("F0.0 B0.0 F0.1 B0.1 O",), "rank 0, position 5, end of list: R0 is missing"),
        (("F0.0 B0.0 F0.1 B0.1 R0",), "rank 0, position 5, end of list: O is missing"),
        (("F0.0 B0.0 F0.1 B0.1 O R0",), "rank 0, position 4, O: the optimizer steps once, last of all"),
        (
            (FIRST.replace("O", "T0~1 O"), SECOND),
            "rank 1, position 10, end of list: T1~0 is missing, the other side of rank 0, position 9, T0~1",
        ),
        (
            (FIRST.replace("R0", "T0~1 R0"), SECOND.replace("O", "T1~0 O")),
            "rank 0, position 8, T0~1: it needs rank 0, position 9, R0",
        ),
        (
            ("F0.0 F0.1 F1.0 F1.1 B1.0 B1.1 B0.0 B0.1 R0 R1 T1~0 O",),
            "rank 0, position 10, T1~0: a rank has nothing to send to itself",
        ),
        (
            (FIRST.replace("O", "T0~1 O").replace("F0.0", "F0.0 F1.0"), SECOND.replace("O", "T1~0 O")),
            "rank 1, position 1, F1.0: stage 1 lives on rank 0",
        ),
        (
            (
                "F0.0 F0.1 F1.0 F1.1 SA1.0>1 SA1.1>1 RG2.0<1 RG2.1<1 B1.0 B1.1 B0.0 B0.1 R0 R1 T1~1 O",
                "RA1.0<0 RA1.1<0 F2.0 F2.1 B2.0 B2.1 SG2.0>0 SG2.1>0 R2 T2~0 O",
            ),
            "rank 0, position 14, T1~1: only the first and the last stage are tied, across ranks",
        ),
        (
            (FIRST.replace("O", "T0~1 T0~1 O"), SECOND.replace("O", "T1~0 O")),
            "rank 0, position 10, T0~1: tied gradients are summed already",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_is_told_with_its_place(ranks: tuple[str, ...], message: str) -> None:
    assert refusal(read(*ranks)).startswith(message)


def test_a_deadlock_names_who_waits_for_what() -> None:
    deadlocked = read(
        "F0.0 SA0.0>1 F0.1 RG1.0<1 SA0.1>1 B0.0 RG1.1<1 B0.1 R0 O",
        "RA0.0<0 F1.0 RA0.1<0 F1.1 B1.0 SG1.0>0 B1.1 SG1.1>0 R1 O",
    )
    assert refusal(deadlocked).splitlines() == [
        "rank 0, position 3, RG1.0<1: deadlock, if every send waits for its receive:",
        "rank 0, position 3, RG1.0<1 waits for rank 1, position 5, SG1.0>0",
        "rank 1, position 2, RA0.1<0 waits for rank 0, position 4, SA0.1>1",
    ]


def test_a_deadlock_names_those_who_wait_to_step() -> None:
    """Ranks 0 and 1 send gradients to each other at once; rank 2 has done all but step."""
    deadlocked = read(
        "F0.0 SA0.0>1 F0.1 SA0.1>1 RA1.0<1 F2.0 SA2.0>1 RA1.1<1 F2.1 SA2.1>1"
        " RG3.0<1 B2.0 SG2.0>1 RG3.1<1 B2.1 SG2.1>1 RG1.0<1 B0.0 RG1.1<1 B0.1 R2 R0 O",
        "RA0.0<0 RA0.1<0 F1.0 SA1.0>0 F1.1 RA2.0<0 SA1.1>0 F3.0 SA3.0>2 RA2.1<0 F3.1 SA3.1>2"
        " RG4.0<2 RG4.1<2 B3.0 SG3.0>0 B3.1 SG3.1>0 RG2.0<0 B1.0 SG1.0>0 RG2.1<0 B1.1 SG1.1>0 R3 R1 O",
        "RA3.0<1 F4.0 RA3.1<1 F4.1 B4.0 SG4.0>1 B4.1 SG4.1>1 R4 O",
    )
    assert refusal(deadlocked).splitlines() == [
        "rank 0, position 12, SG2.0>1: deadlock, if every send waits for its receive:",
        "rank 0, position 12, SG2.0>1 waits for rank 1, position 18, RG2.0<0",
        "rank 1, position 17, SG3.1>0 waits for rank 0, position 13, RG3.1<1",
        "rank 2, position 9, O waits for all ranks",
    ]


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        (Instruction(Op.FORWARD, -1, 0), "rank 0, position 0, F-1.0: stages count from 0"),
        (Instruction(Op.FORWARD, 2**31 - 1, 0), "rank 0, position 0, F2147483647.0: nobody forwards stage 1"),
        (Instruction(Op.BACKWARD, 2**31 - 1, 0), "rank 0, position 0, B2147483647.0: stages are 0 to 0"),
        (Instruction(Op.FORWARD, 0, -1), "rank 0, position 0, F0.-1: microbatches are 0 to 1"),
        (Instruction(Op.SEND_ACTIVATION, 0, 0, peer=-1), "rank 0, position 0, SA0.0>-1: ranks are 0 to 0"),
        (Instruction(Op.PAIR, 0, 0, back_stage=-1, back_microbatch=0), "rank 0, position 0, FB0.0:-1.0: stages count"),
        (Instruction(Op.GATHER, 0), "rank 0, position 0, G0.-1: units count from 0"),
        (Instruction(14), "rank 0, position 0, op 14: there is no such instruction"),  # type: ignore[arg-type]
    ],
    ids=repr,
)
def test_numbers_that_no_text_can_hold_are_refused(instruction: Instruction, message: str) -> None:
    rest = Instructions.parse("F0.0 F0.1 B0.0 B0.1 R0 O")
    assert refusal(Schedule("test", 2, (Instructions.of([instruction, *rest]),))).startswith(message)


def test_a_mistyped_microbatch_takes_no_memory() -> None:
    """A table with a place for each of them would be 16 GB large."""
    schedule = read("F0.0 F0.2000000000 B0.0 R0 O", num_microbatches=2_000_000_001)
    assert refusal(schedule) == "rank 0, position 5, end of list: F0.1 is missing"


def test_nothing_is_no_schedule() -> None:
    assert refusal(Schedule("test", 2, ())) == "a schedule needs ranks and microbatches; this has 0 and 2"
    assert refusal(read("", num_microbatches=0)) == "a schedule needs ranks and microbatches; this has 1 and 0"


def test_a_bound_on_live_activations() -> None:
    schedule = read("F0.0 F0.1 B0.0 B0.1 R0 O")
    assert check(schedule, max_live=[2.0]) is schedule
    message = "rank 0, position 1, F0.1: the rank keeps 2 microbatches' activations, more than max_live=1.5"
    assert refusal(schedule, max_live=[1.5]) == message
    assert refusal(schedule, max_live=[]) == "max_live has 0 bounds; the schedule has 1 ranks"


@pytest.mark.slow
def test_a_million_computing_instructions_take_seconds() -> None:
    """64 ranks x 8 chunks x 1,024 microbatches: 1.7 s where it was tried; the bound leaves room for slower cores."""
    schedule = lower(generate("interleaved", 64, 1024, 8))
    begin = time.process_time()
    check(schedule)
    assert time.process_time() - begin < 10
