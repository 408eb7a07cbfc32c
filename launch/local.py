"""A job of one node on this machine, or of several side by side, as a rehearsal. Imports no torch."""

import os
import signal
import subprocess
import sys
from types import FrameType

from megacore.launch import node
from megacore.launch.job import Job


def run_nodes(job: Job, meet: str, address: str) -> int:
    """Run the node's command, once in this process or once per node in others; the largest exit code."""
    words = ["--nodes", job.range, "--nproc", str(job.gpus), "--job", job.name, "--wait", str(job.wait_s)]
    words += ["--max-restarts", str(job.max_restarts), *job.words]
    if job.nodes == 1:
        return node.main(words)
    words = ["--meet", meet, "--address", address, *words]
    command = [sys.executable, "-m", "megacore.launch.node", *words]
    nodes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for each in nodes:
            os.kill(each.pid, signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, pass_on)
    nodes += [subprocess.Popen(command, start_new_session=True) for _ in range(job.nodes)]
    codes = [each.wait() for each in nodes]
    return max((code if code >= 0 else 1) for code in codes)
