"""Jobs over several hosts of a network, started by the very script that Slurm would run: cut off, lost, and joined.

The hosts are network namespaces on this machine (hosts.py), and stand-ins for srun and scontrol start what the script
says on each of them. Everything from the rendezvous to the heartbeat goes over their addresses.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megacore.checkpoint.find import LATEST
from megacore.exits import STOPPED
from megacore.train.failpoints import VARIABLE
from tests.launch.hosts import Host, network, reason_against
from tests.launch.test_node import ENVIRONMENT, alive, wait_for
from tests.train.runs import events, figures, last_state, words_of, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

QUICK_GUARD = ("guard.silent_s=3", "guard.abort_s=5")
ENDLESS = ("train.steps=100000", "optim.decay_steps=6", "train.eval_every=0", "checkpoint.save_every=20")

# srun: the step's command on every host at once; signals reach all of them; the largest exit code
SRUN = """#!{python}
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
hosts = os.environ["HOSTS"].split()
tasks = [subprocess.Popen(["ip", "netns", "exec", host, *words], start_new_session=True) for host in hosts]
open(os.environ["PIDS"], "w").write(" ".join(str(each.pid) for each in tasks))
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: [each.send_signal(number) for each in tasks])
codes = [each.wait() for each in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo $ADDRESSES | tr ' ' '\\n'
[ "$1" = requeue ] && echo "$2" >> "$PIDS.requeued"
exit 0
"""


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(str(tmp_path_factory.mktemp("data") / "letters"), 1)


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    if reason := reason_against():
        pytest.skip(reason)


class Cluster:
    """Hosts, and a Slurm that knows one job."""

    def __init__(self, hosts: list[Host], folder: Path, nproc: int) -> None:
        self.hosts, self.folder, self.nproc = hosts, folder, nproc
        self.pids = folder / "pids"
        tools = folder / "bin"
        tools.mkdir(parents=True)
        for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.environment = ENVIRONMENT | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PIDS": str(self.pids),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "all",
        }

    def submit(
        self, words: list[str], nodes: str, hosts: list[Host] | None = None, more: tuple[str, ...] = ()
    ) -> "subprocess.Popen[str]":
        """Write the job as a user would, and run its script."""
        self.write(words, nodes, more)
        return self.run(hosts)

    def write(self, words: list[str], nodes: str, more: tuple[str, ...] = ()) -> None:
        """The job's script."""
        launch = [sys.executable, "-m", "megacore", "launch", "slurm", "--nodes", nodes, "--gpus", str(self.nproc)]
        options = ["--gpu", "cpu", "--wait", "120", "--dry-run", *more]
        text = subprocess.run([*launch, *options, *words], capture_output=True, text=True, env=ENVIRONMENT)
        assert text.returncode == 0, text.stderr
        (self.folder / "job.sbatch").write_text(text.stdout)

    def run(self, hosts: list[Host] | None = None) -> "subprocess.Popen[str]":
        """The script, on some of the hosts or all."""
        hosts = self.hosts if hosts is None else hosts
        self.pids.unlink(missing_ok=True)
        given = {"HOSTS": " ".join(h.name for h in hosts), "ADDRESSES": " ".join(h.address for h in hosts)}
        with open(self.folder / "log", "a") as log:
            return subprocess.Popen(
                ["bash", str(self.folder / "job.sbatch")],
                env=self.environment | given,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def node(self, number: int) -> int:
        """The process of a node's command."""
        wait_for(self.pids)
        return int(self.pids.read_text().split()[number])

    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Cluster]:
    with network(3) as hosts:
        yield Cluster(hosts, tmp_path / "cluster", 2)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Cluster]:
    with network(2) as hosts:
        yield Cluster(hosts, tmp_path / "cluster", 2)


@pytest.fixture
def four(tmp_path: Path) -> Iterator[Cluster]:
    with network(4, rate="100mbit") as hosts:
        yield Cluster(hosts, tmp_path / "cluster", 2)


def starts(out: Path) -> list[int]:
    return [each["world_size"] for each in events(out, "start")] if (out / "events.jsonl").exists() else []


def until(what: str, reached: object, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not reached():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)


def end(job: "subprocess.Popen[str]") -> int:
    """Slurm's signal before the time limit."""
    job.send_signal(signal.SIGUSR1)
    return job.wait(120)


def test_tp_pp_dp_over_four_hosts_as_in_one_process(four: Cluster, letters: str, tmp_path: Path) -> None:
    """Eight ranks, two on each host: the figures are those of one machine."""
    from megacore.launch.train import main

    words = words_of(letters, tmp_path / "four", "parallel.tp=2", "parallel.pp=2", "parallel.zero=1")
    assert four.submit(words, "4").wait(400) == 0, four.log()
    assert main(words_of(letters, tmp_path / "one")) == 0
    for ours, theirs in zip(figures(tmp_path / "four"), figures(tmp_path / "one"), strict=True):
        assert ours["step"] == theirs["step"] and ours["tokens"] == theirs["tokens"]
        assert abs(ours["loss"] - theirs["loss"]) < 1e-9 and abs(ours["grad_norm"] - theirs["grad_norm"]) < 1e-8


@pytest.mark.parametrize("victim", [1, 0])
def test_a_host_that_is_cut_off_comes_back(victim: int, two: Cluster, letters: str, tmp_path: Path) -> None:
    """Host 0 has rank 0, the heartbeat's listener and the meeting point; host 1 has none of them."""
    out = tmp_path / "run"
    job = two.submit(words_of(letters, out, "parallel.tp=2", "parallel.pp=2", *QUICK_GUARD, *ENDLESS), "2")
    wait_for(out / "checkpoints" / LATEST)
    two.hosts[victim].cut()
    until("somebody is missed", lambda: events(out, "hang"), 30)
    assert {each["rank"] // 2 for each in events(out, "hang")} in ({1}, {0, 1})
    time.sleep(10)
    assert starts(out) == [4], "nothing goes on without it"
    two.hosts[victim].mend()
    until("the run goes on", lambda: starts(out) == [4, 4])
    saved = len(figures(out))
    until("it trains", lambda: len(figures(out)) > saved + 20)
    assert end(job) == STOPPED and (tmp_path / "cluster" / "pids.requeued").read_text() == "4711\n"
    (stop,) = events(out, "stop")
    assert [each["step"] for each in figures(out)] == list(range(1, stop["step"] + 1))
    assert "Traceback" not in two.log()


def test_the_run_goes_on_with_what_is_left_and_grows_again(three: Cluster, letters: str, tmp_path: Path) -> None:
    """``--nodes 2:3``: a host is lost, two train on; it comes back, and the run saves before it takes it in."""
    out = tmp_path / "run"
    words = words_of(letters, out, "parallel.tp=2", "train.global_batch_size=12", *QUICK_GUARD, *ENDLESS)
    job = three.submit(words, "2:3")
    until("three hosts train", lambda: starts(out) == [6])
    wait_for(out / "checkpoints" / LATEST)
    three.hosts[2].cut()
    os.killpg(three.node(2), signal.SIGKILL)
    until("two hosts train", lambda: starts(out) == [6, 4])
    before = len(figures(out))
    until("they get on", lambda: len(figures(out)) > before + 10)
    three.hosts[2].mend()
    command = Path(f"/proc/{three.node(1)}/cmdline").read_text().split("\0")[:-1]
    late = three.hosts[2].start(command, env=three.environment)
    until("three hosts train again", lambda: starts(out) == [6, 4, 6])
    assert [each["step"] for each in events(out, "stop")], "growing is a stop that saves"
    before = len(figures(out))
    until("they get on", lambda: len(figures(out)) > before + 10)
    assert end(job) in (STOPPED, 128 + signal.SIGKILL) and late.wait(60) == STOPPED
    steps = [each["step"] for each in figures(out)]
    assert steps == list(range(1, len(steps) + 1))


def test_a_job_on_fewer_hosts_goes_on_from_the_same_folder(two: Cluster, letters: str, tmp_path: Path) -> None:
    """The host of the meeting point dies for good with all its processes; the same run on the other one."""
    out = tmp_path / "run"
    words = words_of(letters, out, "parallel.tp=2", "train.steps=60", "optim.decay_steps=60", *QUICK_GUARD)
    job = two.submit(words, "2")
    wait_for(out / "checkpoints" / LATEST)
    ranks = [two.node(0), two.node(1)]
    for pid in ranks:
        os.killpg(pid, signal.SIGKILL)
    assert job.wait(60) == 128 + signal.SIGKILL
    until("children die", lambda: not any(map(alive, ranks)), 10)
    assert two.submit(words, "1", two.hosts[1:]).wait(200) == 0, two.log()
    assert starts(out) == [4, 2]
    assert [each["step"] for each in figures(out)] == list(range(1, 61))


def test_a_fault_on_another_host_is_shown_once(two: Cluster, letters: str, tmp_path: Path) -> None:
    """Every start fails on host 1: its box has the cause, and so have the events that host 0 writes."""
    out = tmp_path / "run"
    two.environment[VARIABLE] = "step:3:4:raise"
    job = two.submit(words_of(letters, out, "parallel.tp=2", "parallel.pp=2"), "2")
    assert job.wait(300) == 1
    boxes = two.log().count("rank 3 of 4 failed")
    assert boxes == 4 and two.log().count(" failed: ") == boxes and "Traceback" not in two.log(), two.log()
    causes = [each["cause"] for each in events(out, "restart")]
    assert len(causes) == 3 and all("rank 3" in each for each in causes), causes
    assert "came to no newer checkpoint" in two.log()


def test_a_preflight_looks_at_every_host(two: Cluster, letters: str, tmp_path: Path) -> None:
    """`megacore doctor` on all ranks, over the very network; then the run."""
    words = words_of(letters, tmp_path / "run", "parallel.tp=2", "parallel.pp=2")
    code = two.submit(words, "2", more=("--preflight",)).wait(300)
    log = two.log()
    assert "4 ranks" in log and "nodes" in log, log
    assert code == (1 if "FAIL" in log else 0), log
    assert starts(tmp_path / "run") == ([] if code else [4]), "what is not in order ends the job"


def test_slurms_grace(two: Cluster, letters: str, tmp_path: Path) -> None:
    """USR1, saved, requeued; the same script goes on; scancel's SIGTERM on one node stops all."""
    out = tmp_path / "run"
    words = words_of(letters, out, "parallel.pp=2", *ENDLESS)
    job = two.submit(words, "2")
    wait_for(out / "checkpoints" / LATEST)
    assert end(job) == STOPPED
    job = two.submit(words, "2")
    until("it goes on", lambda: starts(out) == [4, 4])
    first = len(figures(out))
    until("it trains", lambda: len(figures(out)) > first + 5)
    os.kill(two.node(1), signal.SIGTERM)
    assert job.wait(60) == STOPPED
    assert len(events(out, "stop")) == 2 and last_state(out, events(out, "stop")[1]["step"])
