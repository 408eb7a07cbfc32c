"""The checker against schedules with one to three random faults, each also executed (see ``oracle``): both must say
the same of every one, legal or not."""

import random
import re
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from megacore.schedule import Instruction, Instructions, Op, Schedule
from megacore.schedule.check import check
from megacore.schedule.generators.generate import generate
from megacore.schedule.instruction import MESSAGES
from megacore.schedule.lower import lower
from tests.schedule.oracle import Threads, why_wrong

Lists = list[list[Instruction]]

# kind, ranks, microbatches, chunks, tied
SMALL = (
    ("1f1b", 1, 2, 0, False),
    ("gpipe", 2, 2, 0, False),
    ("1f1b", 2, 3, 0, True),
    ("1f1b", 3, 1, 0, True),
    ("forward", 2, 3, 0, False),
    ("zb-h1", 2, 3, 0, False),
    ("zb-v", 2, 2, 0, False),
)
LARGER = (
    ("forward", 3, 4, 0, False),
    ("gpipe", 3, 3, 0, True),
    ("gpipe", 2, 2, 2, False),
    ("1f1b", 4, 5, 0, False),
    ("interleaved", 2, 4, 2, True),
    ("interleaved", 3, 3, 2, False),
    ("zb-h1", 3, 4, 0, True),
    ("zb-h2", 2, 4, 0, False),
    ("zb-h2", 3, 5, 0, False),
    ("zb-v", 2, 4, 0, False),
    ("zb-v", 3, 3, 0, False),
    ("dualpipe-v", 2, 4, 0, False),
    ("dualpipe-v", 3, 6, 0, False),
)
EDITS = ("drop", "duplicate", "swap", "move", "retarget")
FIELDS = ("stage", "microbatch", "peer", "unit", "back_stage", "back_microbatch")


@pytest.fixture(scope="module")
def threads() -> Threads:
    return Threads(4)


def base(kind: str, num_ranks: int, num_microbatches: int, chunks: int, tied: bool) -> Schedule:
    return lower(generate(kind, num_ranks, num_microbatches, chunks), tied=tied)


def with_units(schedule: Schedule, chance: random.Random) -> Schedule:
    """On each rank two units of one stage come and go."""
    lists = [list(rank) for rank in schedule.ranks]
    for rank, each in enumerate(lists):
        for unit in range(2):
            for turn, place in enumerate(sorted(chance.choices(range(len(each)), k=3))):
                op = (Op.GATHER, Op.FREE)[turn % 2]
                each.insert(place + turn, Instruction(op, schedule.home.index(rank), unit=unit))
    return of(schedule, lists)


def of(schedule: Schedule, lists: Lists) -> Schedule:
    return Schedule(schedule.kind, schedule.num_microbatches, tuple(map(Instructions.of, lists)))


class Mutator:
    """Edits lists in place. Often a second edit is the one that goes with the first, so that not all mutants are
    illegal: what a message, a gather or tied weights have on the other side."""

    def __init__(self, lists: Lists, num_microbatches: int, chance: random.Random) -> None:
        self.lists, self.num_microbatches, self.chance = lists, num_microbatches, chance
        self.num_stages = 1 + max(i.stage for each in lists for i in each)

    def edit(self, kind: str, num_edits: int) -> None:
        while num_edits > 0 and any(self.lists):
            rank = self.chance.choice([rank for rank, each in enumerate(self.lists) if each])
            together = num_edits > 1 and self.chance.random() < 0.6
            getattr(self, kind if kind != "mixed" else self.chance.choice(EDITS))(rank, together)
            num_edits -= 1 + together

    def drop(self, rank: int, together: bool) -> None:
        place = self.any_place(rank, Op.GATHER, Op.FREE, Op.TIED) if together else self.any_place(rank)
        dropped = self.lists[rank].pop(place)
        other = self.other_side(rank, dropped) if together else None
        if other is not None:
            self.lists[other[0]].pop(other[1])

    def duplicate(self, rank: int, together: bool) -> None:
        place = self.any_place(rank, Op.GATHER, Op.FREE) if together else self.any_place(rank)
        doubled = self.lists[rank][place]
        other = self.other_side(rank, doubled) if together else None
        to = self.any_place(rank) if self.chance.random() < 0.5 else place
        second = [self.lists[rank][other[1]]] if other and other[0] == rank else []
        self.lists[rank][to:to] = [doubled, *second]

    def swap(self, rank: int, together: bool) -> None:
        """Half of the time of two messages, else of neighbours or of any two."""
        messages = self.chance.random() < 0.5
        place = self.any_place(rank, *MESSAGES) if messages else self.any_place(rank)
        near = place + self.chance.choice((-2, -1, 1, 2))
        far = self.any_place(rank, *MESSAGES) if messages else self.any_place(rank)
        other_place = min(max(self.chance.choice((near, near, far)), 0), len(self.lists[rank]) - 1)
        swapped = [self.lists[rank][place], self.lists[rank][other_place]]
        others = [self.other_side(rank, each) for each in swapped] if together else []
        exchange(self.lists[rank], place, other_place)
        if len(others) == 2 and others[0] and others[1] and others[0][0] == others[1][0] != rank:
            exchange(self.lists[others[0][0]], others[0][1], others[1][1])

    def move(self, rank: int, together: bool) -> None:
        """A message, or both of its ends, earlier or later."""
        place = self.any_place(rank, *MESSAGES)
        other = self.other_side(rank, self.lists[rank][place]) if together else None
        for each, old in [(rank, place), other] if other else [(rank, place)]:
            moved = self.lists[each].pop(old)
            new = old + self.chance.randint(-6, 6)
            self.lists[each].insert(min(max(new, 0), len(self.lists[each])), moved)

    def retarget(self, rank: int, together: bool) -> None:
        place = self.any_place(rank, Op.GATHER, Op.FREE, Op.INPUT_GRAD) if together else self.any_place(rank)
        old = self.lists[rank][place]
        other = self.other_side(rank, old) if together else None
        new = self.retargeted(old)
        if other and old.op in (Op.GATHER, Op.FREE):
            new = old._replace(unit=self.chance.randrange(3))
            self.lists[other[0]][other[1]] = self.lists[other[0]][other[1]]._replace(unit=new.unit)
        elif other and old.op == Op.INPUT_GRAD:
            new = old._replace(op=Op.BACKWARD)
            self.lists[other[0]][other[1]] = Instruction(Op.GATHER, old.stage, unit=7)
        self.lists[rank][place] = new

    def retargeted(self, old: Instruction) -> Instruction:
        field = self.chance.choice([*used_fields(old), "op"])
        return self.chance.choice(self.retargets(old, field))

    def retargets(self, old: Instruction, field: str) -> list[Instruction]:
        """With every value of a field, and one beyond at both ends."""
        if field == "op":
            return [old._replace(op=op) for op in Op]
        limits = {"peer": len(self.lists), "unit": 3, "stage": self.num_stages, "back_stage": self.num_stages}
        return [old._replace(**{field: value}) for value in range(-1, limits.get(field, self.num_microbatches) + 1)]

    def any_place(self, rank: int, *ops: Op) -> int:
        """Of an instruction with one of some ops, if there is any."""
        wanted = [place for place, each in enumerate(self.lists[rank]) if each.op in ops]
        return self.chance.choice(wanted or range(len(self.lists[rank])))

    def other_side(self, rank: int, i: Instruction) -> tuple[int, int] | None:
        """Rank and place of what goes with an instruction."""
        sides = {
            Op.SEND_ACTIVATION: (i.peer, Op.RECEIVE_ACTIVATION),
            Op.RECEIVE_ACTIVATION: (i.peer, Op.SEND_ACTIVATION),
            Op.SEND_GRADIENT: (i.peer, Op.RECEIVE_GRADIENT),
            Op.RECEIVE_GRADIENT: (i.peer, Op.SEND_GRADIENT),
            Op.TIED: (i.peer, Op.TIED),
            Op.GATHER: (rank, Op.FREE),
            Op.FREE: (rank, Op.GATHER),
            Op.INPUT_GRAD: (rank, Op.WEIGHT_GRAD),
        }
        if i.op not in sides or not 0 <= sides[i.op][0] < len(self.lists):
            return None
        where, op = sides[i.op]
        for place, each in enumerate(self.lists[where]):
            same = op == Op.TIED or (each.stage, each.microbatch, each.unit) == (i.stage, i.microbatch, i.unit)
            if each.op == op and same:
                return where, place
        return None


def used_fields(i: Instruction) -> list[str]:
    return [field for field in FIELDS if getattr(i, field) >= 0]


def exchange(each: list[Instruction], one: int, other: int) -> None:
    if one < len(each) and other < len(each):
        each[one], each[other] = each[other], each[one]


def opinion(schedule: Schedule, threads: Threads) -> str:
    """Legal, deadlock or illegal, of which both are sure."""
    try:
        check(schedule)
        refused = None
    except ValueError as error:
        refused = str(error)
        assert re.match(r"rank \d+, position \d+, .*: ", refused), refused  # not an error of numpy's
    wrong = why_wrong(schedule, threads)
    if (refused is None) != (wrong is None):
        lists = "\n".join(str([tuple(i) for i in rank]) for rank in schedule.ranks)
        pytest.fail(f"{schedule.num_microbatches} microbatches\n{lists}\nchecker: {refused}\nexecuted: {wrong}")
    return "legal" if refused is None else "deadlock" if "deadlock" in refused else "illegal"


@pytest.mark.parametrize("which", SMALL + LARGER, ids=str)
def test_generated_schedules_are_legal(which: tuple[str, int, int, int, bool], threads: Threads) -> None:
    assert opinion(base(*which), threads) == "legal"
    assert opinion(with_units(base(*which), random.Random(1)), threads) == "legal"


@pytest.mark.parametrize(
    ("ranks", "wrong"),
    [
        (("F0.0 SA0.0>1 RA1.0<1", "RA0.0<0 F1.0 SA1.0>0"), "messages are left over"),
        (("F0.0 SA0.0>1", "RA0.0<0 F1.0 RA0.0<0"), "ranks stand still for ever"),
        (("F0.0 SA0.0>1 SA0.0>1", "RA0.0<0 F1.0 RA0.0<0"), "messages are left over"),
        (("RG1.0<1 F0.0 SA0.0>1", "RA0.0<0 F1.0 B1.0 SG1.0>0"), "ranks stand still for ever"),
        (("F0.0 B0.0 R0 O", "F1.0 B1.0 R1 O"), "its input is not there"),
        (("F0.0 B0.0 R0",), "a rank has not stepped"),
        (("F0.0 I0.0 R0 O",), "rank 0, position 2"),
    ],
    ids=str,
)
def test_the_executor_knows_what_is_wrong(ranks: tuple[str, ...], wrong: str, threads: Threads) -> None:
    """Of one microbatch; that it stands still is known at once, not after some time."""
    begin = time.perf_counter()
    found = why_wrong(Schedule("test", 1, tuple(map(Instructions.parse, ranks))), threads)
    assert found and wrong in found
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("kind", [*EDITS, "mixed"])
def test_random_mutants(kind: str, threads: Threads) -> None:
    """12,000 in all."""
    seed, count = f"mutants {kind}", Counter[str]()
    print(f"seed {seed!r}")
    chance = random.Random(seed)
    bases = [base(*which) for which in SMALL + LARGER]
    while count.total() < 2000:
        schedule = bases[count.total() % len(bases)]
        if chance.random() < 0.6:
            schedule = with_units(schedule, chance)
        lists = [list(rank) for rank in schedule.ranks]
        Mutator(lists, schedule.num_microbatches, chance).edit(kind, num_edits=chance.randint(1, 3))
        mutant = of(schedule, lists)
        if mutant != schedule:
            count[opinion(mutant, threads)] += 1
    print(dict(count))
    assert count["legal"] >= 100 and count["illegal"] >= 1000, count


def single_edits(schedule: Schedule) -> Iterator[Lists]:
    """Everything that one edit can make."""
    mutator = Mutator(list(map(list, schedule.ranks)), schedule.num_microbatches, random.Random(0))
    for rank, old in enumerate(list(map(list, schedule.ranks))):
        for place, each in enumerate(old):
            yield replaced(schedule, rank, old[:place] + old[place + 1 :])
            for to in range(len(old) + 1):
                yield replaced(schedule, rank, [*old[:to], each, *old[to:]])
            for other in range(place):
                new = old.copy()
                exchange(new, place, other)
                yield replaced(schedule, rank, new)
            for field in [*used_fields(each), "op"]:
                for new_one in mutator.retargets(each, field):
                    yield replaced(schedule, rank, [*old[:place], new_one, *old[place + 1 :]])


def replaced(schedule: Schedule, rank: int, new: list[Instruction]) -> Lists:
    return [new if each == rank else list(old) for each, old in enumerate(schedule.ranks)]


@pytest.mark.parametrize("which", SMALL, ids=str)
def test_every_single_edit(which: tuple[str, int, int, int, bool], threads: Threads) -> None:
    schedule = base(*which)
    mutants = (of(schedule, lists) for lists in single_edits(schedule))
    count = Counter(opinion(mutant, threads) for mutant in mutants if mutant != schedule)
    print(f"{which}: {dict(count)}")
    assert count["illegal"] > count["legal"], count


def without_parts(schedule: Schedule) -> Iterator[Lists]:
    """All of a rank, of an op, of a microbatch, of a stage, of a stage with its messages gone; and stages renamed."""
    lists = [list(rank) for rank in schedule.ranks]
    for rank in range(len(lists)):
        yield replaced(schedule, rank, [])
    for op in Op:
        yield [[i for i in each if i.op != op] for each in lists]
    for microbatch in range(schedule.num_microbatches):
        yield [[i for i in each if i.microbatch != microbatch] for each in lists]
    last = schedule.num_stages - 1
    for stage in range(last + 1):
        yield [[i for i in each if i.stage != stage] for each in lists]
        yield [[i._replace(stage=last + 1) if i.stage == stage else i for i in each] for each in lists]
    to_last = {(Op.SEND_ACTIVATION, last - 1), (Op.RECEIVE_ACTIVATION, last - 1)}
    yield [[i for i in each if i.stage != last and (i.op, i.stage) not in to_last] for each in lists]


def test_whole_parts_gone(threads: Threads) -> None:
    count = Counter[str]()
    for which in SMALL + LARGER:
        schedule = base(*which)
        mutants = (of(schedule, lists) for lists in without_parts(schedule))
        count.update(opinion(mutant, threads) for mutant in mutants if mutant != schedule)
    print(dict(count))
    assert count["legal"] >= 5 and count["illegal"] >= 100, count
