"""Who holds up the others is named: rules with a clock of their own, and real connections."""

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from megacore.monitor.heartbeat import Beater, Listener
from megacore.monitor.holdups import Finding, Limits, Seen, late, silent
from megacore.monitor.pulse import Pulse, understood, waits

TOKEN = "a secret"
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
    ranks = {rank: seen(100, 90, counts={"dp 0": 20 - (rank == 1)}, waits=True) for rank in range(3)}
    found = late(ranks, 100.0, LIMITS)
    assert found is not None and (found.kind, found.rank) == ("late", 1)
    assert "behind its peers by 1 collectives" in found.text
    assert late(ranks, 97.9, LIMITS) is None, "no more than 8 s"
    busy = ranks | {1: seen(100, 89, doing="saving")}
    assert late(busy, 1000.0, LIMITS) is None, "who saves is not late"


def test_who_waits_for_nobody_holds_up_the_others() -> None:
    """In a pipeline the ranks in the middle begin more messages in a step than the others: totals say nothing."""
    ranks = {
        0: seen(100, 90, collectives=40, counts={"0 1": 20, "1 0": 20}, waits=True),
        1: seen(100, 90, collectives=79, counts={"0 1": 20, "1 0": 19, "1 2": 20, "2 1": 20}, waits=False),
        2: seen(100, 90, collectives=40, counts={"1 2": 20, "2 1": 20}, waits=True),
    }
    found = late(ranks, 100.0, LIMITS)
    assert found is not None and found.rank == 1
    assert "is behind its peers by 1 collectives and waits for nobody" in found.text


def test_who_left_out_a_collective_is_named_though_all_wait() -> None:
    """Rank 3 is one behind in tp, for which ranks 2 and 3 are behind in dp, too."""
    counts = [
        {"tp 0": 9, "dp 0": 5},
        {"tp 0": 9, "dp 1": 5},
        {"tp 2": 8, "dp 0": 4},
        {"tp 2": 7, "dp 1": 4},
    ]
    ranks = {rank: seen(100, 90, counts=each, waits=True) for rank, each in enumerate(counts)}
    found = late(ranks, 100.0, LIMITS)
    assert found is not None and found.rank == 3 and "behind its peers by 2 collectives, in" in found.text


def test_a_rank_that_waits_is_known_by_its_stack() -> None:
    scope: dict[str, Any] = {"__name__": "megacore.mesh.gloo", "goes_on": True}
    exec("def wait():\n    while goes_on:\n        pass", scope)
    thread = threading.Thread(target=scope["wait"], daemon=True)
    thread.start()
    assert thread.ident is not None
    until(lambda: waits(thread.ident))
    scope["goes_on"] = False
    assert not waits(threading.get_ident())


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
    listener = Listener(limits, lambda *each: found.append(each), 3, TOKEN)
    pulses = [Pulse(step, "step", lambda: (5, "all_gather over tp")) for step in range(3)]
    ranks = [
        Beater(i, pulse, ("127.0.0.1", listener.port), TOKEN, limits, lambda *_: None, 0)
        for i, pulse in enumerate(pulses)
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


def test_rank_0_is_watched_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Finding] = []
    listener = Listener(Limits(), lambda *_: None, 2, TOKEN)
    beater = Beater(
        1, Pulse(5), ("127.0.0.1", listener.port), TOKEN, Limits(silent_s=1.5), lambda each, _: found.append(each), 0
    )
    until(lambda: len(listener.seen) == 1)
    monkeypatch.setattr(Listener, "_answer", lambda *_: None)
    until(lambda: bool(found))
    assert found[0].rank == 0 and "This is rank 1, in start-up, step 5" in found[0].text
    beater.close()
    listener.close()


def test_a_connection_that_breaks_is_made_again() -> None:
    found: list[Finding] = []
    listener = Listener(Limits(silent_s=3.0), lambda each, _: found.append(each), 1, TOKEN)
    beater = Beater(0, Pulse(5), ("127.0.0.1", listener.port), TOKEN, Limits(), lambda each, _: found.append(each), 0)
    until(lambda: 0 in listener.seen)
    beater.connection.shutdown(socket.SHUT_RDWR)
    before = listener.seen[0].heard
    until(lambda: listener.seen[0].heard > before + 1.0)
    assert not found
    beater.close()
    listener.close()


def test_beats_take_no_time_of_a_core() -> None:
    """Rank 0 sleeps between beats, also after its first answer has left."""
    limits = Limits(8.0, 60.0, 600.0)
    listener = Listener(limits, lambda *told: None, 2, "token", "127.0.0.1")
    address = ("127.0.0.1", listener.port)
    beaters = [Beater(rank, Pulse(), address, "token", limits, lambda *told: None, 0) for rank in range(2)]
    until(lambda: len(listener.seen) == 2)
    time.sleep(0.7)  # an answer is on its way twice a second
    began, used = time.monotonic(), time.process_time()
    time.sleep(0.8)
    share = (time.process_time() - used) / (time.monotonic() - began)
    for beater in beaters:
        beater.close()
    listener.close()
    assert share < 0.05


def beat(**changes: Any) -> bytes:
    message = Pulse(3).as_beat(0) | {"host": "node3", "pid": 7, "token": TOKEN} | changes
    return json.dumps({key: value for key, value in message.items() if value is not None}).encode()


def test_who_is_none_of_ours_is_not_heard() -> None:
    assert understood(beat(), TOKEN, 2) is not None and understood(beat(typical_s=1), TOKEN, 2) is not None
    wrong = (
        {"token": "x"},
        {"rank": 2},
        {"rank": -1},
        {"rank": True},
        {"typical_s": "a"},
        {"host": None},
        {"stack": 1},
    )
    assert not any(understood(beat(**each), TOKEN, 2) for each in wrong)
    assert not any(understood(line, TOKEN, 2) for line in (b"", b"5", b"GET / HTTP/1.1", b"[]", b"[" * 100_000))


def test_hostile_bytes_end_a_connection_and_nothing_else() -> None:
    listener = Listener(Limits(), lambda *_: None, 1, TOKEN)
    for data in (b"GET / HTTP/1.1\r\n\r\n", beat(rank=9999) + b"\n", b"x" * (1 << 17)):
        with socket.create_connection(("127.0.0.1", listener.port)) as connection:
            with suppress(OSError):
                connection.sendall(data)
            connection.settimeout(10)
            with suppress(ConnectionResetError):
                while connection.recv(4096):
                    pass
    assert listener.thread.is_alive() and not listener.seen
    listener.close()
