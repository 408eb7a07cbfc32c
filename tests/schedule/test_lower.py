"""Lowered lists: what is added, where, and that ranks that block on every send still get to their ends."""

from collections import Counter, deque
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacore.schedule import Instruction, Instructions, Op, Schedule
from megacore.schedule.clock import clock
from megacore.schedule.generators.generate import KINDS, forward_only, generate
from megacore.schedule.instruction import COMPUTE, MESSAGES, SENDS
from megacore.schedule.lower import lower
from megacore.schedule.rows import Rows

TRAINING = [kind for kind in KINDS if kind != "forward"]


def read(*ranks: str, num_microbatches: int = 2) -> Schedule:
    return Schedule("test", num_microbatches, tuple(map(Instructions.parse, ranks)))


def lists(schedule: Schedule) -> list[str]:
    return list(map(str, schedule.ranks))


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Of any kind; and lists that keep to no kind: evaluations and steps in a random order that computes."""
    kind = draw(st.sampled_from([*KINDS, "random", "random"]))
    p, m = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    if kind != "random":
        folded = kind in ("zb-v", "dualpipe-v")
        return generate(kind, p, m, 2 if folded else draw(st.integers(1, 3)))
    home = [*range(p), *draw(st.lists(st.integers(0, p - 1), max_size=3))]
    return random_schedule(home, min(m, 4), draw(st.booleans()), draw(st.randoms(use_true_random=False)))


def random_schedule(home: list[int], m: int, trains: bool, random: Random) -> Schedule:
    """Whatever may run next is put at the end of its rank's list, in a random order."""
    last = len(home) - 1
    ranks: list[list[Instruction]] = [[] for _ in range(max(home) + 1)]
    chains = []
    for i in range(m):
        chain = [Instruction(Op.FORWARD, s, i) for s in range(last + 1)]
        if trains:
            chain += [Instruction(Op.INPUT_GRAD, s, i) for s in range(last, -1, -1)]
            chain += [Instruction(Op.WEIGHT_GRAD, s, i) for s in range(last, -1, -1)]
        chains.append(deque(chain))
    while any(chains):
        chain = random.choice([chain for chain in chains if chain])
        instruction = chain.popleft()
        ranks[home[instruction.stage]].append(instruction)
    return Schedule("random", m, tuple(map(Instructions.of, ranks)))


def meet(schedule: Schedule) -> None:
    """Runs messages as if nothing were buffered: a send and its receive happen when both ranks have come to them.

    Fails where a rank never gets on, or computes from what it has not got.
    """
    ranks = [deque(rank) for rank in schedule.ranks]
    home, last = schedule.home, schedule.num_stages - 1
    has: list[set[str]] = [set() for _ in ranks]
    moved = True
    while moved:
        moved = False
        for r, rank in enumerate(ranks):
            while rank and rank[0].op not in MESSAGES:
                compute(rank.popleft(), has[r], home, last)
                moved = True
            if rank and rank[0].op in SENDS:
                send = rank[0]
                other = ranks[send.peer]
                receive = send._replace(op=Op(send.op + 1), peer=r)
                if other and other[0] == receive:
                    assert name(send) in has[r], f"{send} of rank {r} sends what is not made"
                    has[send.peer].add(name(send))
                    rank.popleft()
                    other.popleft()
                    moved = True
    assert not any(ranks), [str(rank[0]) for rank in ranks if rank]


def name(message: Instruction) -> str:
    gradient = message.op in (Op.SEND_GRADIENT, Op.RECEIVE_GRADIENT)
    return f"{'gradient' if gradient else 'activation'} {message.stage}.{message.microbatch}"


def compute(instruction: Instruction, has: set[str], home: tuple[int, ...], last: int) -> None:
    op, stage, microbatch = instruction.op, instruction.stage, instruction.microbatch
    if op in (Op.FORWARD, Op.PAIR):
        assert stage == 0 or f"activation {stage - 1}.{microbatch}" in has, instruction
        has.add(f"activation {stage}.{microbatch}")
    if op is Op.PAIR:
        stage, microbatch = instruction.back_stage, instruction.back_microbatch
    if op in (Op.BACKWARD, Op.INPUT_GRAD, Op.PAIR):
        assert stage == last or f"gradient {stage + 1}.{microbatch}" in has, instruction
        has.add(f"gradient {stage}.{microbatch}")


@given(schedules(), st.booleans())
def test_ranks_that_block_on_every_send_get_to_their_ends(schedule: Schedule, tied: bool) -> None:
    lowered = lower(schedule, tied)
    assert (lowered.kind, lowered.num_microbatches) == (schedule.kind, schedule.num_microbatches)
    assert [rank.having(*COMPUTE) for rank in lowered.ranks] == list(schedule.ranks)
    meet(lowered)


@given(schedules())
def test_messages_are_those_between_ranks(schedule: Schedule) -> None:
    home, m = schedule.home, schedule.num_microbatches
    expected: Counter[tuple[int, str]] = Counter()
    for low, high in zip(range(len(home)), range(1, len(home))):
        if home[low] != home[high]:
            for i in range(m):
                expected[home[low], f"SA{low}.{i}>{home[high]}"] += 1
                expected[home[high], f"RA{low}.{i}<{home[low]}"] += 1
                if schedule.trains:
                    expected[home[high], f"SG{high}.{i}>{home[low]}"] += 1
                    expected[home[low], f"RG{high}.{i}<{home[high]}"] += 1
    found = Counter(
        (r, str(message)) for r, rank in enumerate(lower(schedule).ranks) for message in rank.having(*MESSAGES)
    )
    assert found == expected


@given(schedules())
def test_sends_follow_what_makes_them(schedule: Schedule) -> None:
    """Nothing is computed in between, so the other rank can have it at once."""
    for rank in lower(schedule).ranks:
        computed = Instruction(Op.OPTIMIZE)
        for instruction in rank:
            if instruction.op in COMPUTE:
                computed = instruction
            elif instruction.op in SENDS:
                front = (computed.stage, computed.microbatch)
                back = (computed.back_stage, computed.back_microbatch) if computed.op is Op.PAIR else front
                made = front if instruction.op is Op.SEND_ACTIVATION else back
                assert made == (instruction.stage, instruction.microbatch)


@given(schedules(), st.booleans())
def test_sums_and_the_step_end_what_trains(schedule: Schedule, tied: bool) -> None:
    lowered = lower(schedule, tied)
    home = schedule.home
    for r, rank in enumerate(lowered.ranks):
        text = str(rank).split()
        if not schedule.trains:
            assert {word[0] for word in text} <= {"F", "S", "R"}
            assert not {"O", *(f"R{stage}" for stage in range(len(home)))} & set(text)
            continue
        own = [stage for stage, rank_of in enumerate(home) if rank_of == r]
        assert sorted(word for word in text if word[1:].isdigit()) == sorted(f"R{stage}" for stage in own)
        for stage in own:
            adding = [i for i, each in enumerate(rank) if accumulates(each) == stage]
            between = range(adding[-1] + 1, text.index(f"R{stage}") + 1)
            assert between
            assert not {rank[i].op for i in between} & set(COMPUTE)
        ends = {home[0]: f"T0~{home[-1]}", home[-1]: f"T{len(home) - 1}~{home[0]}"} if home[0] != home[-1] else {}
        assert text[-1] == "O"
        assert [word for word in text if word[0] == "T"] == ([ends[r]] if tied and r in ends else [])
        if tied and r in ends:
            assert text[-2] == ends[r]


def accumulates(instruction: Instruction) -> int:
    if instruction.op is Op.PAIR:
        return instruction.back_stage
    return instruction.stage if instruction.op in (Op.BACKWARD, Op.WEIGHT_GRAD) else -1


def test_1f1b_on_two_ranks() -> None:
    assert lists(lower(generate("1f1b", 2, 2), tied=True)) == [
        "F0.0 SA0.0>1 F0.1 SA0.1>1 RG1.0<1 B0.0 RG1.1<1 B0.1 R0 T0~1 O",
        "RA0.0<0 F1.0 RA0.1<0 B1.0 SG1.0>0 F1.1 B1.1 SG1.1>0 R1 T1~0 O",
    ]


def test_neighbours_on_one_rank_exchange_nothing() -> None:
    assert lists(lower(generate("zb-v", 1, 1), tied=True)) == ["F0.0 F1.0 I1.0 W1.0 R1 I0.0 W0.0 R0 O"]


def test_a_sum_comes_as_soon_as_it_can() -> None:
    """After what its moment sends, so that nobody waits for it; before what arrives later."""
    lowered = lower(read("F0.0 B0.0", "F1.0 F3.0 B3.0 B1.0", "F2.0 B2.0", num_microbatches=1))
    assert lists(lowered)[1] == "RA0.0<0 F1.0 SA1.0>2 RA2.0<2 F3.0 B3.0 SG3.0>2 R3 RG2.0<2 B1.0 SG1.0>0 R1 O"


def test_evaluations_get_messages_only() -> None:
    assert lists(lower(forward_only([0, 1], 2), tied=True)) == [
        "F0.0 SA0.0>1 F0.1 SA0.1>1",
        "RA0.0<0 F1.0 RA0.1<0 F1.1",
    ]


def test_the_clock_ticks_once_for_a_forward_and_twice_for_a_backward() -> None:
    start, end = clock(Rows(generate("1f1b", 2, 2)))
    assert start.tolist() == [0, 1, 4, 7] + [1, 2, 4, 5]
    assert end.tolist() == [1, 2, 6, 9] + [2, 4, 5, 7]
    start, end = clock(Rows(read("F0.0 F1.0 F0.1 B1.0 FB1.1:0.0 I1.1 I0.1 W0.1 W1.1")))
    assert start.tolist() == [0, 1, 2, 3, 5, 8, 9, 10, 11]
    assert end.tolist() == [1, 2, 3, 5, 8, 9, 10, 11, 12]


@pytest.mark.parametrize("more", ["RA9.0<0", "O", "R0", "SG0.0>1"])
def test_lists_with_more_than_computing_are_taken_as_they_are(more: str) -> None:
    schedule = read("F0.0 B0.0", f"F1.0 B1.0 {more}", num_microbatches=1)
    assert lower(schedule) is schedule


@pytest.mark.parametrize("kind", TRAINING)
def test_lowering_twice_is_lowering_once(kind: str) -> None:
    once = lower(generate(kind, 2, 4))
    assert lower(once) is once


def test_what_waits_for_itself_is_told() -> None:
    with pytest.raises(ValueError) as caught:
        lower(read("F0.0 B0.0 F0.1 B0.1", "F1.0 F1.1 B1.0 B1.1"))
    assert str(caught.value).splitlines() == [
        "rank 0, position 1, B0.0: ranks wait for each other:",
        "rank 0, position 1, B0.0 waits for rank 1, position 2, B1.0",
        "rank 1, position 1, F1.1 waits for rank 0, position 2, F0.1",
    ]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (("F0.0 B0.0 F0.1 B0.1", "F1.0 B1.0 F1.1 B2.1"), "rank 1, position 3, B2.1: no rank forwards its stage"),
        (("F0.0 B0.0 F0.1 B0.2",), "rank 0, position 3, B0.2: microbatches are 0 to 1"),
        (("F0.0 B0.0 F0.1 B0.1", "F1.0 B1.0 B1.1"), "rank 1, position 3, end of list: F1.1 is missing"),
        (("F0.0 B0.0 F0.1 B0.1", "F2.0 B2.0 F2.1 B2.1"), "F1.0 is missing; stages are 0 to 2"),
        (("F1000000.1",), "F0.0 is missing; stages are 0 to 1000000"),
    ],
)
def test_what_cannot_be_put_on_a_clock_is_refused(ranks: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        lower(read(*ranks))
    assert message in str(caught.value)


def test_a_receive_stands_where_its_message_is_made_not_where_it_is_needed() -> None:
    """So that a rank that is busy does not hold up the sender."""
    rank = lists(lower(generate("gpipe", 2, 3, 2)))[0]
    assert rank.startswith("F0.0 SA0.0>1 F0.1 SA0.1>1 RA1.0<1 F0.2 SA0.2>1 RA1.1<1 F2.0 SA2.0>1 RA1.2<1 F2.1")
