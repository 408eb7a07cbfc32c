"""What the engine walks is the list: messages side by side are posted together, and receives may come early."""

import pytest

from megacore.pipeline.engine import AHEAD, compile_list
from megacore.schedule.generators.generate import KINDS, generate
from megacore.schedule.instruction import COMPUTE, RECEIVES
from megacore.schedule.lower import lower
from megacore.schedule.schedule import Instructions


def spelt(text: str, by_name: bool) -> list[str]:
    steps = compile_list(Instructions.parse(text), by_name)
    return [" ".join(map(str, step.instructions)) for step in steps]


def test_messages_that_follow_each_other_are_one_step() -> None:
    text = "F0.0 SA0.0>1 RG1.0<1 B0.0 R0 O"
    assert spelt(text, by_name=False) == ["F0.0", "SA0.0>1 RG1.0<1", "B0.0", "R0", "O"]


def test_receives_come_two_computations_early_and_stay_in_order() -> None:
    text = "F0.0 SA0.0>1 F0.1 SA0.1>1 RG1.0<1 B0.0 RG1.1<1 B0.1"
    assert spelt(text, by_name=True) == ["RG1.0<1", "F0.0", "SA0.0>1 RG1.1<1", "F0.1", "SA0.1>1", "B0.0", "B0.1"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_name", [False, True])
def test_nothing_else_moves(kind: str, by_name: bool) -> None:
    for rank in lower(generate(kind, 4, 6)).ranks:
        listed = list(rank)
        steps = compile_list(listed, by_name)
        walked = [place for step in steps for place in step.places]
        assert sorted(walked) == list(range(len(listed)))
        assert [listed[place] for step in steps for place in step.places] == [i for s in steps for i in s.instructions]
        rest = [place for place in walked if listed[place].op not in RECEIVES]
        assert rest == sorted(rest)
        receives = [place for place in walked if listed[place].op in RECEIVES]
        assert receives == sorted(receives)
        for place in receives:
            over = [p for p in walked[walked.index(place) :] if p < place and listed[p].op in COMPUTE]
            assert len(over) <= AHEAD * by_name
