"""Where nodes and their ranks meet: ports that others hold, and nodes that do not come."""

import errno
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from megacore.launch.places import free_port, refusal
from megacore.launch.roll import RECENT_S, Roll, absent, expand_hosts
from tests.launch.test_node import ENVIRONMENT, node
from tests.train.runs import events, figures, words_of, write_corpus

# Torch's choice of a port for the ranks falls on given ones first, as if they had been taken just after.
UNLUCKY = """
import sys
from torch.distributed.elastic.rendezvous import api
from megacore.exits import run
taken, choose = [int(port) for port in sys.argv[1].split(",")], api.get_free_port
api.get_free_port = lambda: taken.pop() if taken else choose()
sys.exit(run("megacore.launch.node", sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(str(tmp_path_factory.mktemp("data") / "letters"), 1)


@pytest.fixture
def held() -> Iterator[int]:
    """A port where another program accepts and says nothing."""
    with socket.create_server(("", 0)) as server:
        yield int(server.getsockname()[1])


def unlucky(ports: list[int], words: list[str], *own: str) -> list[str]:
    return [sys.executable, "-c", UNLUCKY, ",".join(map(str, ports)), *own, *words]


def test_slurms_list_of_hosts() -> None:
    assert expand_hosts("gpu[008-010,3],login,r[1-2]n[7-8]x") == [
        *("gpu008", "gpu009", "gpu010", "gpu3", "login"),
        *("r1n7x", "r1n8x", "r2n7x", "r2n8x"),
    ]
    assert expand_hosts("") == []


def test_who_is_missing_is_told_where_that_is_sure() -> None:
    slurm = {"SLURM_JOB_NODELIST": "127.0.0.[1-3]"}
    assert absent(["127.0.0.1", "127.0.0.3"], slurm) == ["127.0.0.2"]
    assert absent(["127.0.0.1", "10.0.0.3"], slurm) == [], "they meet in another network"
    assert absent(["127.0.0.1"], {}) == absent(["127.0.0.1"], {"SLURM_JOB_NODELIST": "127.0.0.[a-b]"}) == []


def test_the_roll_outlives_those_who_give_up() -> None:
    roll = Roll("here:1", 3)
    roll.note(["b", "a"], 100.0)
    roll.note(["b"], 101.0)
    assert "2 of 3 have come in 0 s: a, b" in roll.told()
    roll.note(["b"], 100.1 + RECENT_S)
    assert "1 of 3 have come in 0 s: b" in roll.told()


def test_who_waits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megacore.launch.roll.SAY_EVERY_S", 0.0)
    monkeypatch.setattr("megacore.launch.roll.LOOK_EVERY_S", 0.01)
    said: list[str] = []
    present = [SimpleNamespace(addr="b")]
    handler = SimpleNamespace(_state_holder=SimpleNamespace(state=SimpleNamespace(participants=present)))
    heard = threading.Event()
    roll = Roll("gpu1:29400", 2, lambda text: (said.append(text), heard.set()))
    with roll.taken(handler):
        assert heard.wait(20)
    assert re.fullmatch(r"megacore: at gpu1:29400 nodes are waited for: 1 of 2 have come in \d+ s: b\n", said[0])


def test_a_meeting_point_that_another_program_holds(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from megacore.launch import rendezvous

    monkeypatch.setattr(rendezvous, "ANSWER_S", 0.2)
    monkeypatch.setattr(rendezvous, "READ_LIMIT_S", 1)
    nodes = rendezvous.Nodes(2, 2, 1)
    assert refusal(held) == os.strerror(errno.EADDRINUSE) and not refusal(0)
    with pytest.raises(
        ValueError, match=f"cannot listen on its port {held} .*sport = :{held}.*--meet=127.0.0.1:"
    ) as told:
        rendezvous.meeting(nodes, rendezvous.Place("job", "127.0.0.1", held, "127.0.0.1", True), 60.0)
    offered = int(str(told.value).rpartition(":")[2])
    assert not refusal(offered)


@pytest.mark.slow
def test_from_elsewhere_it_may_be_a_node_that_is_slow(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from megacore.launch import rendezvous

    monkeypatch.setattr(rendezvous, "READ_LIMIT_S", 1)
    monkeypatch.setattr(rendezvous, "ANSWER_S", 1)
    place = rendezvous.Place("job", "127.0.0.1", held, "127.0.0.1", False)
    with pytest.raises(rendezvous.LOST, match=f"127.0.0.1:{held} does not answer as a node does"):
        rendezvous.meeting(rendezvous.Nodes(2, 2, 1), place, 60.0)


@pytest.mark.slow
def test_another_port_is_tried_and_counts_as_no_fault(held: int, letters: str, tmp_path: Path) -> None:
    words = words_of(letters, tmp_path, "parallel.tp=2")
    command = unlucky([held, held], words, "--nproc", "2", "--max-restarts", "0")
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"trying another one \((\d) of 5\)", done.stderr) == ["1", "2"]
    assert not events(tmp_path, "restart") and figures(tmp_path) and "Traceback" not in done.stderr


@pytest.mark.slow
def test_all_nodes_try_another_port(held: int, letters: str, tmp_path: Path) -> None:
    words = words_of(letters, tmp_path, "parallel.tp=2")
    own = ("--nodes", "2", "--nproc", "1", "--meet", f"127.0.0.1:{free_port()}", "--address", "127.0.0.1")
    both = [
        subprocess.Popen(unlucky([held], words, *own), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [each.communicate(timeout=200)[1] for each in both]
    assert [each.returncode for each in both] == [0, 0], told
    assert sum(text.count("trying another one (1 of 5)") for text in told) == 1
    assert sum(text.count("this node starts its ranks again") for text in told) == 1
    assert not events(tmp_path, "restart") and figures(tmp_path)


@pytest.mark.slow
def test_ports_that_are_always_taken_end_it(held: int, letters: str, tmp_path: Path) -> None:
    command = unlucky([held] * 6, words_of(letters, tmp_path, "parallel.tp=2"), "--nproc", "2")
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.count("trying another one") == 5
    assert "is in use on this machine" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_held_meeting_point_ends_the_command_soon(held: int, letters: str, tmp_path: Path) -> None:
    own = ("--nodes", "2", "--meet", f"127.0.0.1:{held}", "--address", "127.0.0.1")
    start = time.monotonic()
    done = subprocess.run(
        node(words_of(letters, tmp_path), *own), env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and f"cannot listen on its port {held}" in done.stderr, done.stderr
    assert time.monotonic() - start < 60 and done.stderr.count("megacore: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("came", [1, 2])
def test_nodes_that_do_not_come_are_named(came: int, letters: str, tmp_path: Path) -> None:
    """Where the list gives their names. The node that keeps the list of those that came says it, at the least."""
    port, words = free_port(), words_of(letters, tmp_path)
    own = ("--nodes", "4", "--nproc", "1", "--meet", f"127.0.0.1:{port}", "--wait", "12")
    slurm = ENVIRONMENT | {"SLURM_JOB_NODELIST": "127.0.0.[1-4]"}
    there = [f"127.0.0.{number + 1}" for number in range(came)]
    waiting = []
    for each in there:
        command = node(words, *own, "--address", each)
        waiting.append(subprocess.Popen(command, env=slurm, stderr=subprocess.PIPE, text=True))
        deadline = time.monotonic() + 60
        while not refusal(port):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    told = [each.communicate(timeout=120)[1] for each in waiting]
    assert {each.returncode for each in waiting} == {1}, told
    missing = [f"127.0.0.{number}" for number in range(came + 1, 5)]
    text = rf"{came} of 4 have come in 1\d s: {', '.join(there)}; missing: {', '.join(missing)}; look at the words"
    assert re.search(text, told[0]), told
    assert not any("Traceback" in each for each in told)
