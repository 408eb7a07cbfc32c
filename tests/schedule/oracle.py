"""A second opinion on schedules: they are executed, by one thread per rank, with integers for tensors.

Nothing is buffered: who sends stands still until the receiver takes it, tied weights and optimizer steps stand still
until everybody is there. Each forward turns its input into another integer, each backward its gradient, and a stage's
gradients are accumulated by a fold that shows their order; so what a schedule leaves out, doubles or mixes up shows in
the sums, in a message that nobody uses, in an input that is not there, or in ranks that stand still for ever.

It shares the instructions with the library and nothing else.
"""

import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any

from megacore.schedule import Instruction, Op, Schedule

PRIME = 2**61 - 1
ONLY_FORWARD = {Op.FORWARD, Op.SEND_ACTIVATION, Op.RECEIVE_ACTIVATION, Op.GATHER, Op.FREE}


def mix(*numbers: int) -> int:
    """Another number for every other list of numbers, order included (but for one chance in 2^61)."""
    result = 1
    for number in numbers:
        result = (result * 1_000_003 + number + 7) % PRIME
    return result


def forward(stage: int, microbatch: int, value: int) -> int:
    return mix(1, stage, microbatch, value)


def input_grad(stage: int, microbatch: int, value: int, grad: int) -> int:
    return mix(2, stage, microbatch, value, grad)


def weight_grad(stage: int, microbatch: int, value: int, grad: int) -> int:
    return mix(3, stage, microbatch, value, grad)


class Wrong(Exception):
    """Why a schedule is not legal."""


class Meetings:
    """Where threads stand still until the others have come. One lock guards it all; each thread sleeps on its own.

    When all threads are asleep or gone, and some are asleep, nobody will ever go on. That is known at once, without
    waiting for time to pass.
    """

    def __init__(self, num_ranks: int) -> None:
        self.lock = threading.Lock()
        self.num_ranks, self.num_gone = num_ranks, 0
        self.places: dict[Any, dict[int, Any]] = {}
        self.asleep: set[int] = set()
        self.beds = [threading.Lock() for _ in range(num_ranks)]
        for bed in self.beds:
            bed.acquire()
        self.wrong: str | None = None

    def meet(self, rank: int, place: Any, num_ranks: int, brought: Any) -> dict[int, Any]:
        """What each rank brought, once ``num_ranks`` are at this place."""
        with self.lock:
            self._go_on()
            there = self.places.setdefault(place, {})
            there[rank] = brought
            if len(there) == num_ranks:
                del self.places[place]
                self._wake(set(there) - {rank})
                return there
            self.asleep.add(rank)
            self._look()
        self.beds[rank].acquire()
        with self.lock:
            self._go_on()
        return there

    def leave(self) -> None:
        """A thread is at its end."""
        with self.lock:
            self.num_gone += 1
            self._look()

    def stop(self, why: str) -> None:
        """All threads are to give up; the first reason stays."""
        with self.lock:
            self._stop(why)

    def _stop(self, why: str) -> None:
        self.wrong = self.wrong or why
        self._wake(set(self.asleep))

    def _go_on(self) -> None:
        if self.wrong:
            raise Wrong(self.wrong)

    def _look(self) -> None:
        if self.asleep and len(self.asleep) + self.num_gone == self.num_ranks:
            self._stop(f"ranks stand still for ever at {list(self.places)}")

    def _wake(self, ranks: set[int]) -> None:
        for rank in ranks:
            self.asleep.remove(rank)
            self.beds[rank].release()


class Rank:
    """Executes one rank's list."""

    def __init__(self, rank: int, num_ranks: int, last_stage: int, num_microbatches: int, meetings: Meetings) -> None:
        self.rank, self.num_ranks, self.last_stage = rank, num_ranks, last_stage
        self.num_microbatches = num_microbatches
        self.meetings = meetings
        self.mailbox: dict[tuple[str, int, int], int] = {}
        self.made: dict[tuple[str, int, int], int] = {}
        self.used: set[tuple[str, int, int]] = set()
        self.saved: dict[tuple[int, int], int] = {}
        self.put_off: dict[tuple[int, int], tuple[int, int]] = {}
        self.accumulated: dict[int, int] = {}
        self.reduced: dict[int, int] = {}
        self.tied: dict[int, int] = {}
        self.gathered: set[tuple[int, int]] = set()
        self.stages: set[int] = set()
        self.stepped = False

    def run(self, instructions: Iterable[Instruction]) -> None:
        for position, instruction in enumerate(instructions):
            try:
                self.must(not self.stepped, "the step is over")
                self.do(instruction)
            except Wrong as wrong:
                raise Wrong(f"rank {self.rank}, position {position}, {tuple(instruction)}: {wrong}") from None

    def must(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise Wrong(otherwise)

    def do(self, i: Instruction) -> None:
        match i.op:
            case Op.FORWARD:
                self.write_forward(i.stage, i.microbatch, self.read_forward(i.stage, i.microbatch))
            case Op.BACKWARD:
                self.write_backward(i.stage, i.microbatch, *self.read_backward(i.stage, i.microbatch))
            case Op.PAIR:
                value = self.read_forward(i.stage, i.microbatch)
                back = self.read_backward(i.back_stage, i.back_microbatch)
                self.write_forward(i.stage, i.microbatch, value)
                self.write_backward(i.back_stage, i.back_microbatch, *back)
            case Op.INPUT_GRAD:
                value, grad = self.read_backward(i.stage, i.microbatch)
                self.make("G", i.stage, i.microbatch, input_grad(i.stage, i.microbatch, value, grad))
                self.put_off[i.stage, i.microbatch] = value, grad
            case Op.WEIGHT_GRAD:
                self.must((i.stage, i.microbatch) in self.put_off, "no weight gradient was put off")
                self.accumulate(i.stage, i.microbatch, *self.put_off.pop((i.stage, i.microbatch)))
            case Op.SEND_ACTIVATION:
                self.send("A", i)
            case Op.SEND_GRADIENT:
                self.send("G", i)
            case Op.RECEIVE_ACTIVATION:
                self.receive("A", i)
            case Op.RECEIVE_GRADIENT:
                self.receive("G", i)
            case _:
                self.do_rest(i)

    def do_rest(self, i: Instruction) -> None:
        if i.op != Op.OPTIMIZE:
            self.stages.add(i.stage)
        match i.op:
            case Op.REDUCE:
                self.must(i.stage in self.accumulated and i.stage not in self.reduced, "nothing to reduce")
                self.reduced[i.stage] = self.accumulated[i.stage]
            case Op.TIED:
                self.must(i.stage in self.reduced and i.stage not in self.tied, "nothing to tie")
                self.check_peer(i.peer)
                mine = (i.stage, self.reduced[i.stage])
                both = self.meetings.meet(self.rank, frozenset((self.rank, i.peer)), 2, mine)
                self.tied[i.stage] = mix(*(number for pair in sorted(both.values()) for number in pair))
            case Op.GATHER:
                self.must(i.unit >= 0 and (i.stage, i.unit) not in self.gathered, "it is there")
                self.gathered.add((i.stage, i.unit))
            case Op.FREE:
                self.must((i.stage, i.unit) in self.gathered, "it is not there")
                self.gathered.remove((i.stage, i.unit))
            case Op.OPTIMIZE:
                self.must(set(self.reduced) == self.stages, "some stages are not reduced")
                self.stepped = True
                self.meetings.meet(self.rank, "step", self.num_ranks, None)

    def read_forward(self, stage: int, microbatch: int) -> int:
        self.stages.add(stage)
        if stage == 0:
            self.must(0 <= microbatch < self.num_microbatches, "no such microbatch")
            return mix(0, microbatch)
        return self.take("A", stage - 1, microbatch)

    def write_forward(self, stage: int, microbatch: int, value: int) -> None:
        self.make("A", stage, microbatch, forward(stage, microbatch, value))
        self.saved[stage, microbatch] = value

    def read_backward(self, stage: int, microbatch: int) -> tuple[int, int]:
        self.must((stage, microbatch) in self.saved, "nothing was saved for it")
        value = self.saved.pop((stage, microbatch))
        if stage == self.last_stage:
            return value, mix(4, self.made["A", stage, microbatch])
        return value, self.take("G", stage + 1, microbatch)

    def write_backward(self, stage: int, microbatch: int, value: int, grad: int) -> None:
        self.make("G", stage, microbatch, input_grad(stage, microbatch, value, grad))
        self.accumulate(stage, microbatch, value, grad)

    def accumulate(self, stage: int, microbatch: int, value: int, grad: int) -> None:
        self.must(stage not in self.reduced, "its sum has been taken already")
        self.accumulated[stage] = mix(self.accumulated.get(stage, 0), weight_grad(stage, microbatch, value, grad))

    def make(self, what: str, stage: int, microbatch: int, value: int) -> None:
        self.must((what, stage, microbatch) not in self.made, "it was made already")
        self.made[what, stage, microbatch] = value

    def take(self, what: str, stage: int, microbatch: int) -> int:
        """An input: from the mailbox, which it leaves, or made here."""
        key = what, stage, microbatch
        self.must(key in self.mailbox or key in self.made, "its input is not there")
        return self.mailbox.pop(key) if key in self.mailbox else self.made[key]

    def send(self, what: str, i: Instruction) -> None:
        self.check_peer(i.peer)
        key = what, i.stage, i.microbatch
        self.must(key in self.made, "what is to be sent is not there")
        both = self.meetings.meet(self.rank, (self.rank, i.peer), 2, (key, self.made[key]))
        self.must(both[i.peer] == key, "the receiver expects something else")

    def receive(self, what: str, i: Instruction) -> None:
        self.check_peer(i.peer)
        key = what, i.stage, i.microbatch
        sent, value = self.meetings.meet(self.rank, (i.peer, self.rank), 2, key)[i.peer]
        self.must(sent == key, "the sender sends something else")
        self.must(key not in self.mailbox, "it was received already")
        self.mailbox[key] = value

    def check_peer(self, peer: int) -> None:
        self.must(0 <= peer < self.num_ranks and peer != self.rank, "no such peer")


class Threads:
    """One thread per rank, used again for schedule after schedule."""

    def __init__(self, num_threads: int) -> None:
        self._jobs: list[queue.SimpleQueue[Callable[[], None]]] = [queue.SimpleQueue() for _ in range(num_threads)]
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()
        for jobs in self._jobs:
            threading.Thread(target=self._serve, args=(jobs,), daemon=True).start()

    def _serve(self, jobs: "queue.SimpleQueue[Callable[[], None]]") -> None:
        while True:
            jobs.get()()
            self._done.put(None)

    def run(self, jobs: list[Callable[[], None]]) -> None:
        """Runs some jobs at once, no more than there are threads, and waits for all."""
        assert len(jobs) <= len(self._jobs)
        for thread, job in zip(self._jobs, jobs):
            thread.put(job)
        for _ in jobs:
            self._done.get(timeout=60)


def why_wrong(schedule: Schedule, threads: Threads) -> str | None:
    """None if the schedule is legal, else why not."""
    lists = [list(rank) for rank in schedule.ranks]
    everything = [i for each in lists for i in each]
    forwarded = {i.stage for i in everything if i.op in (Op.FORWARD, Op.PAIR)}
    if not forwarded or forwarded != set(range(len(forwarded))):
        return f"the stages are {sorted(forwarded)}"
    meetings = Meetings(len(lists))
    ranks = [
        Rank(rank, len(lists), len(forwarded) - 1, schedule.num_microbatches, meetings) for rank in range(len(lists))
    ]

    def job(rank: Rank, instructions: list[Instruction]) -> None:
        try:
            rank.run(instructions)
        except Wrong as wrong:
            meetings.stop(str(wrong))
        except Exception as fault:  # of the oracle itself: never to be taken for an opinion
            meetings.stop(f"oracle: {fault!r}")
        meetings.leave()

    threads.run([lambda rank=rank, each=each: job(rank, each) for rank, each in zip(ranks, lists)])
    assert not (meetings.wrong or "").startswith("oracle"), meetings.wrong
    return meetings.wrong or what_is_wrong_at_the_end(
        ranks, len(forwarded), schedule.num_microbatches, trains=any(i.op not in ONLY_FORWARD for i in everything)
    )


def what_is_wrong_at_the_end(ranks: list[Rank], num_stages: int, num_microbatches: int, trains: bool) -> str | None:
    """The ranks against one that computes everything alone, microbatch after microbatch."""
    outputs, sums = serial(num_stages, num_microbatches)
    stages = [stage for rank in ranks for stage in rank.stages]
    last = {key: value for rank in ranks for key, value in rank.made.items() if key[:2] == ("A", num_stages - 1)}
    checks = {
        "a stage is on two ranks or on none": sorted(stages) == list(range(num_stages)),
        "a rank has no stage": all(rank.stages for rank in ranks),
        "messages are left over": not any(rank.mailbox for rank in ranks),
        "outputs differ": [last.get(("A", num_stages - 1, m)) for m in range(num_microbatches)] == outputs
        and len(last) == num_microbatches,
    }
    if trains:
        reduced = {stage: value for rank in ranks for stage, value in rank.reduced.items()}
        tied = {stage: value for rank in ranks for stage, value in rank.tied.items()}
        both = mix(0, sums[0], num_stages - 1, sums[-1])
        checks |= {
            "weight gradients are left over": not any(rank.put_off for rank in ranks),
            "gradients differ": [reduced.get(stage) for stage in range(num_stages)] == sums,
            "tied gradients differ": tied in ({}, {0: both, num_stages - 1: both}),
            "a rank has not stepped": all(rank.stepped for rank in ranks),
        }
    return next((why for why, holds in checks.items() if not holds), None)


def serial(num_stages: int, num_microbatches: int) -> tuple[list[int], list[int]]:
    """The outputs of the last stage, and every stage's accumulated gradients."""
    outputs, sums = [], [0] * num_stages
    for microbatch in range(num_microbatches):
        value, values = mix(0, microbatch), []
        for stage in range(num_stages):
            values.append(value)
            value = forward(stage, microbatch, value)
        outputs.append(value)
        grad = mix(4, value)
        for stage in reversed(range(num_stages)):
            sums[stage] = mix(sums[stage], weight_grad(stage, microbatch, values[stage], grad))
            grad = input_grad(stage, microbatch, values[stage], grad)
    return outputs, sums
