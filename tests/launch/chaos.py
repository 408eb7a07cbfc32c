"""Jobs over hosts of a network, one process, one command, or one whole host of which is killed."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launch.hosts import network, reason_against
from tests.launch.test_hosts import Cluster
from tests.launch.test_node import children
from tests.train.chaos import alive, killed
from tests.train.notes import environment

CUT_SHARE = 0.25
"""Of killed hosts: those whose cable is out, so that the others do not even see connections closed."""
ANEW_SHARE = 0.5
"""Of kills that a scheduler answers by ending what is left of the job and running it again, from the same script; else
it gives the lost host its command again while the others wait."""


class Hosts:
    """A job by the very script that `megacore launch slurm` writes, on hosts with addresses of their own."""

    kinds = {"rank": 1, "launcher": 1, "host": 3}

    def __init__(self, cluster: Cluster, words: Sequence[str], folder: Path) -> None:
        self.cluster, self.folder, self.notes = cluster, folder, folder / "notes"
        cluster.environment = environment(self.notes, **cluster.environment)
        cluster.write(
            [*words, "guard.silent_s=3", "guard.abort_s=5"], str(len(cluster.hosts)), ("--max-restarts", "50")
        )
        self.job: subprocess.Popen[str] | None = None
        self.late: dict[int, subprocess.Popen[str]] = {}
        """By host: its command where that was given again by itself."""

    def start(self) -> None:
        self.late.clear()
        self.job = self.cluster.run()

    def over(self) -> bool:
        assert self.job is not None
        code, late = self.job.poll(), [each.poll() for each in self.late.values()]
        if code is None or None in late:
            return False
        # the job's own code is that of its worst task, among which are those that were killed
        assert (code == 0 or self.late) and not any(late), f"{code}, {late}: {self.log()}"
        return True

    def node(self, host: int) -> int:
        """The process of a host's command; 0 where there is none yet."""
        if host in self.late:
            return self.late[host].pid
        try:
            return int(self.cluster.pids.read_text().split()[host])
        except (OSError, IndexError):
            return 0

    def ranks(self) -> list[int]:
        nodes = [pid for pid in map(self.node, range(len(self.cluster.hosts))) if pid and alive(pid)]
        return [child for pid in nodes for child in children(pid)]

    def kill(self, what: str, chance: random.Random) -> bool:
        host = chance.randrange(len(self.cluster.hosts))
        node = self.node(host)
        if not node or not alive(node):
            return False
        command = Path(f"/proc/{node}/cmdline").read_text().split("\0")[:-1]
        if "megacore.launch.node" not in command:
            return False  # it is only just coming up
        cut = what == "host" and chance.random() < CUT_SHARE
        if cut:
            self.cluster.hosts[host].cut()
        if what == "host":
            self.kill_all(host)
        elif not killed(node):
            return False
        if anew := chance.random() < ANEW_SHARE:
            self.end()
        elif cut:
            time.sleep(chance.uniform(0.0, 8.0))  # those who are left must notice by themselves
        if cut:
            self.cluster.hosts[host].mend()
        if anew:
            self.start()
        else:
            with open(self.cluster.folder / "log", "a") as log:
                given = self.cluster.environment
                again = self.cluster.hosts[host].start(command, env=given, stdout=log, stderr=log)
            self.late[host] = again
        return True

    def kill_all(self, host: int) -> int:
        """Every process on a host; how many there were."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.cluster.hosts[host].name], capture_output=True, text=True, check=True
        )
        return sum(killed(int(pid)) for pid in found.stdout.split())

    def log(self) -> str:
        return self.cluster.log()[-10_000:]

    def end(self) -> None:
        """All that is left of the job, at once."""
        if self.job is not None and self.job.poll() is None:
            for pid in children(self.job.pid):
                os.kill(pid, signal.SIGKILL)  # srun
            self.job.kill()
        for host in range(len(self.cluster.hosts)):
            self.kill_all(host)
        for each in (self.job, *self.late.values()):
            if each is not None:
                each.wait()


@contextmanager
def hosts_or_skip(count: int, nproc: int, folder: Path) -> Iterator[Cluster]:
    """So many hosts of so many ranks each."""
    if reason := reason_against():
        pytest.skip(reason)
    with network(count) as hosts:
        yield Cluster(hosts, folder, nproc)
