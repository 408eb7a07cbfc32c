"""One rank of a local run: what happens in each process that `run_local` starts."""

import ctypes
import importlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from megacore import processes
from megacore.launch.failures import Failure
from megacore.mesh.rank_info import RankInfo

PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Assignment:
    """What a rank is to do: call `target` ("module:function") with its RankInfo and `args`."""

    target: str
    args: tuple[Any, ...]
    info: RankInfo
    num_threads: int


def work(assignment: Assignment, connection: Connection) -> None:
    """Carries it out and sends its exit code, or the Failure, to the parent."""
    end_with_parent()
    # A Ctrl-C reaches the parent too, which passes it on as SIGTERM, once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, _nothing_to_save)
    # The fork server held these back; what has come since is heard now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # lines of ranks must not tear
    if sys.platform == "linux":
        # All ranks are on this machine: gloo needs neither the host's name nor its network.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    answer: int | Failure
    try:
        set_threads(assignment.num_threads)
        answer = call(assignment.target, assignment.info, assignment.args)
    except SystemExit as leaving:
        answer = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException as error:
        answer = Failure.of_exception(assignment.info.rank, error)
    connection.send(answer)
    if isinstance(answer, Failure):
        # At once, without waiting for threads: the peers notice by the closed connections.
        sys.stdout.flush()
        os._exit(1)


def _nothing_to_save(number: int, frame: FrameType | None) -> None:
    """A wish to save at start-up: a handler, since what is ignored stays ignored."""


def call(target: str, info: RankInfo, args: tuple[Any, ...]) -> int:
    """The exit code of the target; one that returns None has done its work."""
    code = load(target)(info, *args)
    return 0 if code is None else int(code)


def load(target: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def set_threads(num_threads: int) -> None:
    """The ranks share the cores; OMP_NUM_THREADS overrides."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_threads)


def end_with_parent() -> None:
    """From now on this process ends when the one that called `run_local` is gone, however that came."""
    # The fork server outlives a killed parent as long as it has children, so the ranks watch the parent themselves.
    processes.end_with_parent()
    # Should the fork server be killed, the kernel ends the ranks: the parent takes them for dead and cannot.
    killed_with_parent()


def end_with_node(pid: int) -> None:
    """From now on this rank ends when the node's command, its parent ``pid``, is gone, however that came."""
    killed_with_parent()
    if os.getppid() != pid:
        os._exit(1)  # it was gone before


def killed_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies; it can do that on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
