"""The checker against mutants of good schedules, and against an obvious second opinion."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megacore.schedule import Instruction, Op, Schedule
from megacore.schedule.check import check
from megacore.schedule.generators.single import forward_only, one_stage

Ranks = tuple[tuple[Instruction, ...], ...]


def read(*ranks: str, num_microbatches: int = 2) -> Schedule:
    return Schedule("test", num_microbatches, tuple(tuple(map(Instruction.parse, rank.split())) for rank in ranks))


GOOD = (
    read("F0.0 B0.0 F0.1 B0.1 R0 O"),
    read("F0.0 F0.1 B0.0 B0.1 R0 O"),
    read("F0.0 F0.1 B0.0 B0.1 R0 O", "F1.0 B1.0 F1.1 B1.1 R1 O"),
    read("F0.0 F2.0 B2.0 B0.0 F0.1 F2.1 B2.1 B0.1 R2 R0 O", "F1.0 B1.0 F1.1 B1.1 R1 O"),
)


def is_good(schedule: Schedule) -> bool:
    """Every rank's list, read as one would explain it."""
    wanted = range(schedule.num_microbatches)
    homes = [{i.stage for i in rank if i.op is not Op.OPTIMIZE} for rank in schedule.ranks]
    stages = sorted(stage for home in homes for stage in home)
    if not stages or stages != list(range(len(stages))):
        return False
    for rank, home in zip(schedule.ranks, homes):
        for stage in home:
            text = [str(i) for i in rank]
            forward = [f"F{stage}.{m}" for m in wanted]
            backward = [f"B{stage}.{m}" for m in wanted]
            if [t for t in text if t.startswith(f"F{stage}.")] != forward:
                return False
            if [t for t in text if t.startswith(f"B{stage}.")] != backward:
                return False
            if any(text.index(f) > text.index(b) for f, b in zip(forward, backward)):
                return False
            if text.count(f"R{stage}") != 1 or any(text.index(f"R{stage}") < text.index(b) for b in backward):
                return False
        if not home or [i for i, x in enumerate(rank) if x.op is Op.OPTIMIZE] != [len(rank) - 1]:
            return False
    return True


@pytest.mark.parametrize("schedule", GOOD)
def test_good_schedules_pass(schedule: Schedule) -> None:
    assert check(schedule) is schedule
    assert is_good(schedule)


@pytest.mark.parametrize("kind", ["1f1b", "gpipe"])
@pytest.mark.parametrize("num_microbatches", [1, 2, 5])
def test_generated_schedules_are_good(kind: str, num_microbatches: int) -> None:
    schedule = one_stage(kind, num_microbatches)
    assert is_good(schedule)
    live = peak = 0
    for instruction in schedule.ranks[0]:
        live += {Op.FORWARD: 1, Op.BACKWARD: -1}.get(instruction.op, 0)
        peak = max(peak, live)
    assert peak == (1 if kind == "1f1b" else num_microbatches)


def test_one_stage_has_no_pipeline() -> None:
    with pytest.raises(ValueError, match="parallel.schedule=zb-h1 needs parallel.pp > 1"):
        one_stage("zb-h1", 2)


def test_evaluation_only_goes_forward() -> None:
    assert [str(instruction) for instruction in forward_only(3).ranks[0]] == ["F0.0", "F0.1", "F0.2"]


def everywhere(schedule: Schedule) -> list[tuple[int, int]]:
    return [(rank, place) for rank, list_ in enumerate(schedule.ranks) for place in range(len(list_))]


def with_rank(schedule: Schedule, rank: int, instructions: list[Instruction]) -> Schedule:
    ranks = [list(old) for old in schedule.ranks]
    ranks[rank] = instructions
    return Schedule(schedule.kind, schedule.num_microbatches, tuple(map(tuple, ranks)))


@pytest.mark.parametrize("schedule", GOOD)
def test_nothing_can_be_left_out_or_done_twice(schedule: Schedule) -> None:
    for rank, place in everywhere(schedule):
        old = list(schedule.ranks[rank])
        for mutant in (old[:place] + old[place + 1 :], old[:place] + [old[place]] + old[place:]):
            with pytest.raises(ValueError, match=f"rank {rank}"):
                check(with_rank(schedule, rank, mutant))


@given(st.sampled_from(GOOD), st.lists(st.tuples(st.integers(0, 2), *[st.integers(0, 12)] * 2), min_size=1, max_size=3))
def test_the_checker_agrees_with_a_second_opinion(schedule: Schedule, edits: list[tuple[int, int, int]]) -> None:
    """Any few drops, doublings and swaps."""
    for kind, one, other in edits:
        rank, place = everywhere(schedule)[one % len(everywhere(schedule))]
        old = list(schedule.ranks[rank])
        to = other % len(old)
        if kind == 0:
            old.pop(place)
        elif kind == 1:
            old.insert(to, old[place])
        else:
            old[place], old[to] = old[to], old[place]
        schedule = with_rank(schedule, rank, old)
        assume(everywhere(schedule))
    if is_good(schedule):
        check(schedule)
    else:
        with pytest.raises(ValueError, match="rank|stage"):
            check(schedule)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (read("B0.0 F0.0 F0.1 B0.1 R0 O"), "rank 0, position 0, B0.0: its forward has not run"),
        (read("F0.0 B0.0 B0.1 F0.1 R0 O"), "rank 0, position 2, B0.1: its forward has not run"),
        (read("F0.1 F0.0 B0.0 B0.1 R0 O"), "rank 0, position 0, F0.1: microbatch 0 of 2 is due"),
        (read("F0.0 F0.1 B0.1 B0.0 R0 O"), "rank 0, position 2, B0.1: microbatch 0 of 2 is due"),
        (read("F0.0 B0.0 F0.1 B0.1 F0.2 B0.2 R0 O"), "rank 0, position 4, F0.2: microbatch 2 of 2 is due"),
        (read("F0.0 B0.0 R0 O"), "rank 0, position 2, R0: a stage's gradients are summed once, after its last"),
        (read("F0.0 B0.0 F0.1 R0 B0.1 O"), "rank 0, position 3, R0: a stage's gradients are summed once, after its"),
        (read("F0.0 B0.0 F0.1 B0.1 O"), "rank 0, position 4, O: stages [0] have not summed their gradients"),
        (read("F0.0 B0.0 F0.1 B0.1 R0 O O"), "rank 0, position 6, O: nothing may follow the optimizer step"),
        (read("F0.0 B0.0 F0.1 B0.1 R0"), "rank 0 ends without an optimizer step"),
        (read("O"), "rank 0 has no stage"),
        (read(*2 * ("F0.0 B0.0 F0.1 B0.1 R0 O",)), "rank 1 has stage 0, which rank 0 has already"),
        (read("F1.0 B1.0 F1.1 B1.1 R1 O"), "the ranks have stages [1]; they must be 0 to 0"),
    ],
)
def test_a_fault_is_told_with_its_place(schedule: Schedule, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check(schedule)
