"""Faults on purpose happen where and when they are asked for, and nowhere else."""

import errno

import pytest

from megacore.train.failpoints import VARIABLE, Failpoints, Fault, Provoked, parse


def test_what_can_be_asked_for() -> None:
    assert parse("write#2:0:100:kill") == Fault("write", 2, 0, 100, "kill")
    assert parse("step:*:*:raise") == Fault("step", 1, None, None, "raise")


@pytest.mark.parametrize(
    "text", ["", "write", "write:0:1", "write:0:1:burn", "read:0:1:kill", "write#0:0:1:kill", "write:-1:1:kill"]
)
def test_what_cannot(text: str) -> None:
    with pytest.raises(ValueError, match=rf"{VARIABLE}=.* is not POINT\[#N\]:RANK:STEP:ACTION .* or unset it"):
        parse(text)


def test_faults_are_of_one_rank() -> None:
    environment = {VARIABLE: "write:0:1:raise,fsync:*:1:raise"}
    assert [fault.point for fault in Failpoints.of(environment, 0).faults] == ["write", "fsync"]
    assert [fault.point for fault in Failpoints.of(environment, 1).faults] == ["fsync"]
    assert Failpoints.of({}, 0).faults == ()


def test_operations_are_counted_within_a_save() -> None:
    """The save of step 4 goes on while step 5 runs."""
    points = Failpoints((parse("write#2:*:4:enospc"), parse("step:*:6:raise")))
    for step in (2, 4):
        points.begin(step)
        points.begin_save(step)
        points.notice("write a")
        points.notice("fsync a")
        points.begin(step + 1)
        if step == 2:
            points.notice("write b")
    with pytest.raises(OSError) as caught:
        points.notice("write b")
    assert caught.value.errno == errno.ENOSPC
    points.notice("write c")
    with pytest.raises(Provoked, match="step at step 6"):
        points.begin(6)
