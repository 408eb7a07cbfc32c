"""The simulator: by hand on small lists, against a slower one on all kinds, with and without messages in the lists."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacore.cost.simulate import Durations, simulate
from megacore.cost.timeline import Timeline
from megacore.schedule.generators.generate import KINDS, default_chunks, generate
from megacore.schedule.instruction import COMPUTE, Instruction, Op
from megacore.schedule.lower import lower
from megacore.schedule.schedule import Instructions, Schedule


def schedule(*ranks: str) -> Schedule:
    lists = tuple(map(Instructions.parse, ranks))
    return Schedule("by hand", 1 + max(int(rank.microbatch.max()) for rank in lists), lists)


def times(timeline: Timeline) -> list[dict[str, tuple[float, float]]]:
    """Of each rank: instruction -> (start, end)."""
    lists = zip(timeline.schedule.ranks, timeline.start, timeline.end)
    return [{str(one): (s, e) for one, s, e in zip(rank, start.tolist(), end.tolist())} for rank, start, end in lists]


def computing(timeline: Timeline) -> list[dict[str, tuple[float, float]]]:
    """The same of what computes."""
    return [
        {text: span for text, span in rank.items() if Instruction.parse(text).op in COMPUTE} for rank in times(timeline)
    ]


def slow(lists: Schedule, d: Durations) -> list[dict[str, tuple[float, float]]]:
    """Instruction by instruction in any order that works; per-stage durations, no messages in the lists."""
    ended: dict[tuple[str, int, int], tuple[int, float]] = {}
    done: list[dict[str, tuple[float, float]]] = [{} for _ in lists.ranks]
    todo = [list(rank) for rank in lists.ranks]
    last = lists.num_stages - 1
    while any(todo):
        before = sum(map(len, todo))
        for rank, rest in enumerate(todo):
            while rest:
                op, s, m, _, _, bs, bm = rest[0]
                parts = [("F", s, m), ("B", bs, bm)] if op is Op.PAIR else [({0: "F", 3: "W"}.get(op, "B"), s, m)]
                needs = []
                for what, stage, microbatch in parts:
                    if what == "F" and stage > 0:
                        needs.append(("F", stage - 1, microbatch))
                    if what == "B":
                        needs += [("F", stage, microbatch)] + [("B", stage + 1, microbatch)] * (stage < last)
                    if what == "W":
                        needs.append(("B", stage, microbatch))
                if not all(need in ended for need in needs):
                    break
                arrive = [ended[need][1] + (d.p2p if ended[need][0] != rank else 0) for need in needs]
                start = max([0.0, *arrive, *(end for _, end in done[rank].values())])
                table = {0: d.forward, 1: d.backward, 2: d.input_grad, 3: d.weight_grad}
                took = d.overlap * (d.forward[s] + d.backward[bs]) if op is Op.PAIR else table[op][s]
                done[rank][str(rest.pop(0))] = start, start + took
                ended |= dict.fromkeys(parts, (rank, start + took))
        assert sum(map(len, todo)) < before, "blocked"
    return done


shapes = st.tuples(st.sampled_from(sorted(KINDS)), st.integers(1, 5), st.integers(1, 11), st.integers(1, 3))
# Multiples of 1/8, so that sums are exact in whatever order.
time = st.integers(0, 40).map(lambda n: n / 8)


@settings(max_examples=80, deadline=None)
@given(shape=shapes, data=st.data())
def test_the_slow_way_and_lists_with_messages_give_the_same_times(shape, data):
    kind, ranks, microbatches, chunks = shape
    lists = generate(kind, ranks, microbatches, chunks if default_chunks(kind) == 1 else 0)
    each = st.lists(time, min_size=lists.num_stages, max_size=lists.num_stages)
    forward, backward, input_grad, weight_grad = (data.draw(each) for _ in range(4))
    durations = Durations(forward, backward, input_grad, weight_grad, data.draw(time), data.draw(time))
    found = simulate(lists, durations)
    assert times(found) == slow(lists, durations)
    assert computing(simulate(lower(lists), durations)) == times(found)


def test_by_hand():
    lists = schedule("F0.0 F0.1 B0.0 B0.1", "F1.0 B1.0 F1.1 B1.1")
    timeline = simulate(lists, Durations(forward=(1, 2), backward=(3, 4), p2p=0.5))
    assert times(timeline) == [
        {"F0.0": (0, 1), "F0.1": (1, 2), "B0.0": (8, 11), "B0.1": (14, 17)},
        {"F1.0": (1.5, 3.5), "B1.0": (3.5, 7.5), "F1.1": (7.5, 9.5), "B1.1": (9.5, 13.5)},
    ]
    assert timeline.makespan == 17
    assert timeline.rank_idle == (9, 0)
    assert timeline.bubble_fraction == pytest.approx(1 - 20 / 34)


def test_messages_leave_with_their_maker_and_keep_no_rank_busy():
    found = times(simulate(lower(schedule("F0.0 F0.1", "F1.0 F1.1")), Durations(p2p=0.25)))
    assert found[0] == {"F0.0": (0, 1), "SA0.0>1": (1, 1.25), "F0.1": (1, 2), "SA0.1>1": (2, 2.25)}
    assert found[1] == {"RA0.0<0": (1, 1.25), "F1.0": (1.25, 2.25), "RA0.1<0": (2, 2.25), "F1.1": (2.25, 3.25)}


def test_a_send_that_is_put_off_leaves_late():
    found = times(simulate(schedule("F0.0 F0.1 SA0.0>1 SA0.1>1", "RA0.0<0 F1.0 RA0.1<0 F1.1")))
    assert found[1]["F1.0"] == (2, 3)


def test_sums_keep_their_rank_and_meetings_wait_for_all():
    whole = lower(schedule("F0.0 B0.0", "F1.0 B1.0"), tied=True)
    found = times(simulate(whole, Durations(reduce=(2, 8), tied=0.5, optimize=1)))
    assert found[0] | found[1] == {
        "F0.0": (0, 1), "SA0.0>1": (1, 1), "RA0.0<0": (1, 1), "F1.0": (1, 2), "B1.0": (2, 4), "SG1.0>0": (4, 4),
        "R1": (4, 12), "RG1.0<1": (4, 4), "B0.0": (4, 6), "R0": (6, 8), "T0~1": (12, 12.5), "T1~0": (12, 12.5),
        "O": (12.5, 13.5),
    }  # fmt: skip


def test_a_pair_may_overlap():
    lists = schedule("F0.0 FB0.1:0.0 B0.1")
    assert times(simulate(lists, Durations(overlap=0.5)))[0]["FB0.1:0.0"] == (1, 2.5)


def test_parameters_are_gathered_beside():
    found = times(simulate(schedule("G0.0 F0.0 X0.0 B0.0 R0 O")))[0]
    assert (found["G0.0"], found["X0.0"]) == ((0, 0), (1, 1))


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        (["F0.0 F0.0"], "rank 0, position 1, F0.0: the forward of its stage and microbatch stands twice|position 0"),
        (["F0.0 B0.0 B0.0"], "the backward of its stage and microbatch stands twice"),
        (["F0.0", "F1.0 F1.1"], "rank 1, position 1, F1.1: the forward that it needs stands nowhere"),
        (["F0.0 B0.0", "F1.0"], "rank 0, position 1, B0.0: the backward that it needs stands nowhere"),
        (["B0.0 F0.0"], "rank 0, position 0, B0.0: the forward that it needs does not stand before it"),
        (["F0.0 W0.0"], "rank 0, position 1, W0.0: the backward that it needs stands nowhere"),
        (["FB0.0:0.0"], "FB0.0:0.0: the forward that it needs does not stand before it"),
        (["F0.0", "B0.0"], "rank 1, position 0, B0.0: the forward that it needs stands on another rank"),
        (["F0.0 F0.1 SA0.0>1", "F1.0 F1.1"], "F1.1: the forward that it needs stands on another rank and is not sent"),
        (["F0.0 B0.0 O", "F1.0 B1.0"], "rank 0, position 2, O: rank 1 never joins it"),
        (["F0.0 T0~1", "F1.0"], "rank 0, position 1, T0~1: rank 1 never joins it"),
        (
            ["F0.0 B0.0 F0.1 B0.1", "F1.0 F1.1 B1.0 B1.1"],
            "cannot run to their ends: rank 0, position 1, B0.0 waits for rank 1, position 2, B1.0; "
            "rank 1, position 1, F1.1 waits for rank 0, position 2, F0.1",
        ),
    ],
)
def test_what_cannot_run_is_refused(ranks, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        simulate(schedule(*ranks))


@pytest.mark.parametrize(
    ("durations", "said"),
    [
        (Durations(forward=-1), r"rank 0, position 0, F0\.0 takes -1\.0: give it a time of 0 or more"),
        (Durations(backward=math.nan), r"B0\.0 takes nan"),
        (Durations(forward=(1, 1)), "forward has the times of 2 stages, the schedule has 1"),
        (Durations(p2p=-0.5), r"p2p=-0\.5 is not a time of 0 or more"),
    ],
)
def test_what_is_no_time_is_refused(durations, said):
    with pytest.raises(ValueError, match=said):
        simulate(schedule("F0.0 B0.0"), durations)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_with_a_timeline_s_own_means_is_that_timeline(kind):
    stages = 3 * max(default_chunks(kind), 2)
    rng = np.random.default_rng(7)
    forward, half, other, reduce = rng.uniform(1, 2, (4, stages))
    given = Durations(*map(tuple, (forward, half + other, half, other)), 0.25, 0.75, tuple(reduce), 3, 4)
    whole = lower(generate(kind, 3, 7, 2), tied=True)
    found = simulate(whole, given)
    again = simulate(whole, Durations.measured(found))
    for one, other in zip((*found.start, *found.end), (*again.start, *again.end)):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_means_of_a_timeline():
    lists = schedule("F0.0 I0.0 W0.0 F0.1 I0.1 W0.1")
    start, end = np.array([0.0, 1, 3, 4, 7, 8]), np.array([1.0, 3, 4, 7, 8, 11])
    means = Durations.measured(Timeline(lists, (start,), (end,)))
    assert means == Durations((2.0,), (3.5,), (1.5,), (2.0,), reduce=(0.0,))
    waited = schedule("F0.0 B0.0 O", "F1.0 B1.0 O")
    start, end = [np.array([0.0, 3, 5]), np.array([1.0, 2, 3])], [np.array([1.0, 5, 6]), np.array([2.0, 3, 6])]
    assert Durations.measured(Timeline(waited, tuple(start), tuple(end))).optimize == 1
    unknown = Durations.measured(simulate(schedule("F0.0 B0.0")))
    with pytest.raises(ValueError, match=r"I0\.0 takes nan: give it a time"):
        simulate(lists, unknown)


def test_nothing_takes_no_time():
    assert simulate(Schedule("empty", 1, (Instructions.of([]), Instructions.of([])))).makespan == 0
