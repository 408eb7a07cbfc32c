"""A job as every scheduler needs it: what runs on each node, with which environment. Imports no torch."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from megacore.launch.environment import Setting
from megacore.launch.places import PORT

OF_JOBS = (
    Setting("PYTHONUNBUFFERED", "1", "what ranks say is in the log when they die"),
    Setting("PYTHONFAULTHANDLER", "1", "a crash in C++ shows Python's stack"),
    Setting("PYTHONSAFEPATH", "1", "megacore is the installed one, whatever lies where the job runs"),
    Setting("NCCL_DEBUG", "WARN", "NCCL says why it fails; INFO shows what it chose"),
)
"""What every job on a cluster wants."""


@dataclass(frozen=True)
class Job:
    """``words`` are those of `megacore train`; ``out`` is the run's folder as nodes see it; ``gpus``: ranks per node,
    each with a GPU if ``has_gpus``."""

    name: str
    words: tuple[str, ...]
    out: str
    nodes: int
    fewest: int
    gpus: int
    has_gpus: bool
    environment: tuple[Setting, ...]
    python: str
    workdir: str
    image: str = ""
    mounts: tuple[str, ...] = ()
    grace_s: int = 600
    wait_s: int = 1800
    max_restarts: int = 3
    preflight: bool = False
    run_text: str = ""
    """The run file itself, where nodes do not see it."""

    @property
    def range(self) -> str:
        """Nodes as the node's command takes them."""
        return str(self.nodes) if self.fewest == self.nodes else f"{self.fewest}:{self.nodes}"


def node_command(job: Job, meet: str, address: str = "") -> list[str]:
    """What runs on every node, a shell's words; ``meet`` and ``address`` may be a shell's expressions and are not
    quoted."""
    own = ["--nodes", job.range, "--nproc", str(job.gpus), "--meet", meet]
    own += ["--address", address] if address else []
    own += ["--job", quoted(job.name), "--wait", str(job.wait_s), "--max-restarts", str(job.max_restarts)]
    return [quoted(job.python), "-m", "megacore.launch.node", *own, *map(quoted, job.words)]


def preflight_command(job: Job, meet: str, address: str = "") -> list[str]:
    """`megacore doctor` over all nodes and GPUs, a shell's words; it names a node that is not in order."""
    command = node_command(job, meet, address)
    return [*command[:3], "--preflight", *command[3:]]


def torchrun_command(job: Job, meet: str) -> list[str]:
    """The same job under plain torchrun: restarts are counted over the whole run, a stop ends with 0."""
    return [
        *("torchrun", "--nnodes", job.range, "--nproc-per-node", str(job.gpus), "--rdzv-backend", "c10d"),
        *("--rdzv-id", quoted(job.name), "--rdzv-endpoint", meet, "--max-restarts", str(job.max_restarts)),
        *("-m", "megacore", "train", *map(quoted, job.words)),
    ]


def lines(words: Sequence[str], indent: str = "    ", width: int = 100) -> str:
    """A shell command over several lines."""
    found, line = list[str](), ""
    for word in words:
        if line and len(line) + 1 + len(word) > width:
            found.append(line)
            line = ""
        line = f"{line} {word}" if line else word
    return f" \\\n{indent}".join([*found, line])


def quoted(word: str) -> str:
    """For a shell, and only where it must be."""
    return shlex.quote(word)


def meeting(host: str) -> str:
    """A meeting point at the usual port."""
    return f"{host}:{PORT}"


def explained(settings: Sequence[Setting], before: str = "") -> list[str]:
    """Each variable's line of export with its reason."""
    return [f"{before}export {each.name}={quoted(each.value)}  # {each.why}" for each in settings]


WAIT = """\
# wait is woken by a trap; 127 says that the step had been waited for already, or could not start
code=127
while :; do
    woken=0 status=0
    wait "$step" || status=$?
    [ "$status" -eq 127 ] || code=$status
    [ "$woken" -eq 1 ] || break
done
"""
"""Shell lines: wait for the process ``step`` and have its exit code in ``code``; traps set ``woken=1``."""
