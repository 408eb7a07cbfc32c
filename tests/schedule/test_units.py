"""Lists by unit: each unit once and in order, sums when complete, parameters there while they are used."""

from collections import Counter
from itertools import groupby, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacore.schedule.generators.generate import forward_only, generate
from megacore.schedule.instruction import COMPUTE, MESSAGES, Instruction, Op
from megacore.schedule.lower import lower
from megacore.schedule.units import NEEDS_PARAMS, by_unit, with_early_sums

KINDS = {"gpipe": 1, "1f1b": 1, "interleaved": 3, "zb-h1": 1, "zb-h2": 1, "zb-v": 2, "dualpipe-v": 2}
"""Chunks of each."""

Lists = tuple[list[Instruction], list[Instruction], dict[int, int]]


@st.composite
def lists(draw: st.DrawFn, gathers: bool) -> Lists:
    """(a rank's lowered list, the same by unit, units of its stages)"""
    kind = draw(st.sampled_from(sorted(KINDS)))
    pp, num_microbatches = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    planned = generate(kind, pp, num_microbatches, KINDS[kind])
    if draw(st.booleans()):
        planned = forward_only(planned.home, num_microbatches)
    rank = draw(st.integers(0, pp - 1))
    coarse = list(lower(planned).ranks[rank])
    num_units = {stage: draw(st.integers(1, 4)) for stage, home in enumerate(planned.home) if home == rank}
    return coarse, by_unit(coarse, num_units, gathers), num_units


def halves(instructions: list[Instruction]) -> list[Instruction]:
    """With pairs taken apart."""
    found = []
    for each in instructions:
        if each.op is Op.PAIR:
            found.append(Instruction(Op.FORWARD, each.stage, each.microbatch))
            found.append(Instruction(Op.BACKWARD, each.back_stage, each.back_microbatch))
        else:
            found.append(each)
    return found


@given(st.booleans().flatmap(lists))
def test_every_unit_is_computed_once_and_in_order(drawn: Lists) -> None:
    """A stage's units follow each other, with no message between; nothing between ranks moves."""
    coarse, fine, num_units = drawn
    expected = []
    for each in halves(coarse):
        if each.op in COMPUTE:
            units = range(num_units[each.stage])
            expected += [each._replace(unit=unit) for unit in (units if each.op is Op.FORWARD else reversed(units))]
        elif each.op is not Op.REDUCE:
            expected.append(each)
    assert [each for each in fine if each.op not in (Op.REDUCE, Op.GATHER, Op.FREE)] == expected
    assert not any(each.op is Op.PAIR for each in fine)


@given(lists(gathers=False), st.data())
def test_sums_of_whole_gradients_begin_in_the_last_backward(drawn: Lists, data: st.DataObject) -> None:
    """Nothing else changes; a stage that cannot be cut, or is not to be, is summed as a whole where it was."""
    coarse, _, num_units = drawn
    some = {stage: number for stage, number in num_units.items() if data.draw(st.booleans())}
    fine = with_early_sums(coarse, some)
    whole = [each._replace(unit=-1) for each in fine if each.op is not Op.REDUCE]
    assert [each for each, _ in groupby(whole)] == [each for each in coarse if each.op is not Op.REDUCE]
    sums = [(each.stage, each.unit) for each in fine if each.op is Op.REDUCE]
    stages = {each.stage for each in coarse if each.op is Op.REDUCE}
    for stage in stages:
        cut = [unit for summed, unit in sums if summed == stage]
        paired = {number for each in coarse if each.op is Op.PAIR for number in (each.stage, each.back_stage)}
        assert cut in ([-1], list(reversed(range(some.get(stage, 0)))))
        assert cut == [-1] or stage in some
        assert stage in paired or stage not in some or cut != [-1]
    for place, each in enumerate(fine):
        if each.op is Op.REDUCE and each.unit >= 0:
            before, rest = fine[place - 1], fine[place:]
            assert before.op in (Op.BACKWARD, Op.WEIGHT_GRAD)
            assert (before.stage, before.unit) == (each.stage, each.unit)
            backs = [other for other in rest if other.op in (Op.BACKWARD, Op.WEIGHT_GRAD)]
            assert all(other.unit < each.unit for other in backs if other.stage == each.stage), "it was the last"
            assert not any(other.op is Op.PAIR and other.back_stage == each.stage for other in rest)


def test_the_documented_example_of_early_sums() -> None:
    listed = [*map(Instruction.parse, "F0.0 B0.0 F0.1 B0.1 R0 O".split())]
    assert " ".join(map(str, with_early_sums(listed, {0: 2}))) == "F0.0 B0.0 F0.1/0 F0.1/1 B0.1/1 R0/1 B0.1/0 R0/0 O"
    split = [*map(Instruction.parse, "F0.0 I0.0 F0.1 I0.1 W0.0 W0.1 R0 O".split())]
    assert " ".join(map(str, with_early_sums(split, {0: 2}))) == (
        "F0.0 I0.0 F0.1/0 F0.1/1 I0.1/1 I0.1/0 W0.0 W0.1/1 R0/1 W0.1/0 R0/0 O"
    )


def test_where_weights_come_late_the_first_forward_goes_by_unit_too() -> None:
    listed = [*map(Instruction.parse, "F0.0 B0.0 F0.1 B0.1 F0.2 B0.2 R0 O".split())]
    fine = with_early_sums(listed, {0: 2}, late_weights=True)
    assert " ".join(map(str, fine)) == ("F0.0/0 F0.0/1 B0.0/1 B0.0/0 F0.1 B0.1 F0.2/0 F0.2/1 B0.2/1 R0/1 B0.2/0 R0/0 O")
    assert with_early_sums(listed, {}, late_weights=True) == listed


@given(st.booleans().flatmap(lists))
def test_a_unit_is_summed_right_after_its_last_outstanding_weight_gradient(drawn: Lists) -> None:
    fine = [each for each in drawn[1] if each.op is not Op.FREE]  # which may come between
    outstanding: Counter[tuple[int, int]] = Counter()  # input gradients whose weight gradients are to come
    unsummed: Counter[tuple[int, int]] = Counter()  # weight gradients since the last sum
    for place, each in enumerate(fine):
        at = each.stage, each.unit
        if each.op is Op.REDUCE:
            assert not outstanding[at] and unsummed.pop(at), "there is something to sum, and it is complete"
            before = fine[place - 1]
            assert before.op in (Op.BACKWARD, Op.WEIGHT_GRAD) and (before.stage, before.unit) == at
        elif each.op is Op.INPUT_GRAD:
            outstanding[at] += 1
        elif each.op in (Op.BACKWARD, Op.WEIGHT_GRAD):
            outstanding[at] -= each.op is Op.WEIGHT_GRAD
            unsummed[at] += 1
            if not outstanding[at]:
                assert fine[place + 1] == Instruction(Op.REDUCE, each.stage, unit=each.unit)
        elif each.op in (Op.TIED, Op.OPTIMIZE):
            assert not +unsummed and not +outstanding, "all sums have begun"


@given(lists(gathers=True))
def test_parameters_are_there_while_they_are_used_and_no_longer(drawn: Lists) -> None:
    _, fine, _ = drawn
    here: set[tuple[int, int]] = set()
    for place, each in enumerate(fine):
        at = each.stage, each.unit
        if each.op is Op.GATHER:
            assert at not in here, "gathered twice"
            here.add(at)
            assert len(here) <= 3, "the one in use, the next, and no more"
        elif each.op is Op.FREE:
            here.remove(at)
            assert fine[place - 1].op in NEEDS_PARAMS and fine[place - 1][1] == each.stage, "at once"
        elif each.op in NEEDS_PARAMS:
            assert at in here, f"{each} is not there"
    assert not here


@given(lists(gathers=True))
def test_parameters_come_one_use_ahead(drawn: Lists) -> None:
    """While a unit computes, the next one's are on their way."""
    _, fine, _ = drawn
    uses = [place for place, each in enumerate(fine) if each.op in NEEDS_PARAMS]
    for before, after in pairwise(uses):
        unit = fine[after].stage, fine[after].unit
        if unit != (fine[before].stage, fine[before].unit):
            gathers = [place for place in range(before) if fine[place] == Instruction(Op.GATHER, *_gather(unit))]
            assert gathers and before - gathers[-1] <= 2, "asked for right before the use ahead of it"


def _gather(unit: tuple[int, int]) -> tuple[int, int, int, int]:
    return unit[0], -1, -1, unit[1]


@given(lists(gathers=False))
def test_nothing_is_gathered_where_parameters_stay(drawn: Lists) -> None:
    assert not any(each.op in (Op.GATHER, Op.FREE) for each in drawn[1])


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_gathered_twice_per_microbatch(kind: str) -> None:
    """Once forwards and once backwards, but where one use follows another of the same unit: the turns."""
    num_microbatches, units = 4, 5
    for instructions in lower(generate(kind, 2, num_microbatches, KINDS[kind])).ranks:
        stages = {each.stage for each in instructions if each.op in COMPUTE and each.op is not Op.PAIR}
        fine = by_unit(instructions, dict.fromkeys(stages, units), gathers=True)
        gathers = Counter((each.stage, each.unit) for each in fine if each.op is Op.GATHER)
        assert all(num_microbatches <= number <= 2 * num_microbatches for number in gathers.values())
        assert all(gathers[stage, 1] == 2 * num_microbatches for stage in stages), "a unit in the middle has no turn"
        assert not any(each.op in MESSAGES and each.unit >= 0 for each in fine)


def test_the_documented_example() -> None:
    text = "F0.0 B0.0 R0"
    coarse = [Instruction.parse(word) for word in text.split()]
    assert " ".join(map(str, by_unit(coarse, {0: 2}, gathers=False))) == "F0.0/0 F0.0/1 B0.0/1 R0/1 B0.0/0 R0/0"
    gathered = "G0.0 G0.1 F0.0/0 X0.0 F0.0/1 G0.0 B0.0/1 X0.1 R0/1 B0.0/0 X0.0 R0/0"
    assert " ".join(map(str, by_unit(coarse, {0: 2}, gathers=True))) == gathered


def test_lagging_weight_gradients_are_summed_with_the_last() -> None:
    coarse = [Instruction.parse(word) for word in "F0.0 F0.1 I0.0 I0.1 W0.0 W0.1 R0 O".split()]
    fine = by_unit(coarse, {0: 1}, gathers=False)
    assert " ".join(map(str, fine)) == "F0.0/0 F0.1/0 I0.0/0 I0.1/0 W0.0/0 W0.1/0 R0/0 O"
