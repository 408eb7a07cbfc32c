"""Who holds up the others is named: rules with a clock of their own, and real connections."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from megacore.monitor.heartbeat import Beater, Finding, Limits, Listener, Pulse, Seen, late, silent

LIMITS = Limits(silent_s=8.0, abort_s=60.0, step_s=600.0)


def seen(heard: float, changed: float, step: int = 7, collectives: int = 40, **more: Any) -> Seen:
    beat = {"step": step, "doing": "step", "collectives": collectives, "last": "all_reduce over dp", "typical_s": 0.5}
    return Seen("node3", 123, heard, changed, beat | more)


def test_the_silent_rank_is_named() -> None:
    ranks = {0: seen(99.5, 99.0), 1: seen(91.0, 90.0), 2: seen(99.9, 99.0)}
    (found,) = silent(ranks, 100.0, LIMITS)
    assert (found.kind, found.rank, found.seconds) == ("silent", 1, 9.0)
    assert "rank 1 (node3, process 123) has been silent for 9 s" in found.text
    assert "step 7, after all_reduce over dp (collective 40)" in found.text
    assert not list(silent(ranks, 98.9, LIMITS))


def test_the_rank_that_is_behind_is_named() -> None:
    ranks = {0: seen(100, 90), 1: seen(100, 89, collectives=39), 2: seen(100, 90)}
    found = late(ranks, 100.0, LIMITS)
    assert found is not None and (found.kind, found.rank) == ("late", 1)
    assert "behind the others by 1 collectives" in found.text
    assert late(ranks, 97.9, LIMITS) is None, "no more than 8 s"
    busy = ranks | {1: seen(100, 89, doing="saving")}
    assert late(busy, 1000.0, LIMITS) is None, "who saves is not late"


@pytest.mark.parametrize(("typical", "limit"), [(0.5, 8.0), (3.0, 30.0), (0.0, 600.0)])
def test_slow_steps_have_time(typical: float, limit: float) -> None:
    """Ten usual steps, or as long as a silent rank; where no step has ended, as long as any may last."""
    ranks = {rank: seen(1e6, 100.0, typical_s=typical) for rank in range(3)}
    assert late(ranks, 100.0 + limit - 0.1, LIMITS) is None
    assert late(ranks, 100.0 + limit + 0.1, LIMITS) is not None
    if not typical:
        assert late(ranks, 1e9, Limits(step_s=0.0)) is None


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def test_beats_over_the_wire() -> None:
    """Rank 1 stops beating without a goodbye; rank 2 says it. The others' stacks are asked for."""
    found: list[tuple[Finding, str]] = []
    limits = Limits(silent_s=2.5)
    listener = Listener(limits, lambda *each: found.append(each))
    pulses = [Pulse(step, "step", lambda: (5, "all_gather over tp")) for step in range(3)]
    ranks = [
        Beater(i, pulse, ("127.0.0.1", listener.port), limits, lambda *_: None, 0) for i, pulse in enumerate(pulses)
    ]
    until(lambda: len(listener.seen) == 3)
    assert listener.seen[2].beat["step"] == 2
    ranks[2].close()
    until(lambda: len(listener.seen) == 2)
    ranks[1].ended = True
    until(lambda: bool(found))
    assert [(each.kind, each.rank) for each, _ in found] == [("silent", 1)]
    until(lambda: ranks[0].gives_stack)
    ranks[0].close()
    listener.close()


def test_rank_0_is_watched_by_the_others() -> None:
    found: list[Finding] = []
    listener = Listener(Limits(), lambda *_: None)
    beater = Beater(
        1, Pulse(5), ("127.0.0.1", listener.port), Limits(silent_s=1.5), lambda each, _: found.append(each), 0
    )
    until(lambda: len(listener.seen) == 1)
    listener.ended = True  # it no longer answers
    until(lambda: bool(found))
    assert found[0].rank == 0 and "This is rank 1, in start-up, step 5" in found[0].text
    beater.close()
    listener.close()
