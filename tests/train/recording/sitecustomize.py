"""Notes what ranks do, from outside: Python loads this file at its start where its folder is on PYTHONPATH.

A process that trains appends to MEGACORE_NOTES/NANOSECONDS-PID, one JSON list per line: [time, kind, details...]. Each
line is one write, so a process that is killed leaves whole lines behind. Kinds: "train" (rank, world size), "life" (a
word that the ranks of one start share), "step" (number, then per microbatch its ordinals and a hash of the tokens that
this rank was given), "does" (evaluation, saving, the end), "save" (an operation on files), "left".
"""

import importlib.abc
import importlib.machinery
import os
import sys
from types import ModuleType
from typing import Any

LOOP = "megacore.train.loop"


class Notes:
    """Of this process."""

    def __init__(self) -> None:
        self.file = -1

    def open(self, folder: str) -> None:
        import time

        path = os.path.join(folder, f"{time.time_ns()}-{os.getpid()}")
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, kind: str, *details: Any) -> None:
        import json
        import time

        if self.file >= 0:
            os.write(self.file, json.dumps([time.time(), kind, *details]).encode() + b"\n")


def hash_of(inputs: Any) -> str:
    """Of what the rank computes with."""
    import hashlib

    return hashlib.sha256(inputs.token_bs.numpy().tobytes() + inputs.label_bs.numpy().tobytes()).hexdigest()[:16]


def hook(loop: ModuleType, notes: Notes) -> None:
    """Put ourselves before what a rank calls in any case."""
    from megacore.monitor.heartbeat import Beater
    from megacore.train.failpoints import Failpoints
    from megacore.train.feed import Feed
    from megacore.train.heart import Heart

    train, step, does, notice, beat = loop.train, Feed.step, Heart.does, Failpoints.notice, Beater.__init__

    def noted_train(info: Any, *args: Any, **more: Any) -> int:
        notes.open(os.environ["MEGACORE_NOTES"])
        notes.write("train", info.rank, info.world_size)
        if info.world_size == 1:
            notes.write("life", f"alone-{os.getpid()}")
        try:
            code: int = train(info, *args, **more)
            return code
        finally:
            notes.write("left")

    def noted_beat(beater: Any, rank: int, pulse: Any, address: Any, token: str, *args: Any, **more: Any) -> None:
        notes.write("life", token)  # made by rank 0 for all ranks of this start
        beat(beater, rank, pulse, address, token, *args, **more)

    def noted_step(feed: Any, number: int) -> Any:
        microbatches = step(feed, number)
        notes.write("step", number, *([each.ordinal_b.tolist(), hash_of(each)] for each in microbatches))
        return microbatches

    def noted_does(heart: Any, what: str) -> None:
        notes.write("does", what)
        does(heart, what)

    def noted_notice(failpoints: Any, operation: str) -> None:
        notes.write("save", operation)
        notice(failpoints, operation)

    loop.train = noted_train  # type: ignore[attr-defined]
    Feed.step, Heart.does, Failpoints.notice = noted_step, noted_does, noted_notice  # type: ignore[method-assign]
    Beater.__init__ = noted_beat  # type: ignore[assignment, method-assign]


class Hook(importlib.abc.MetaPathFinder):
    """Finds the loop as ever, and hooks it once it is loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != LOOP:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def executed(module: ModuleType) -> None:
                execute(module)
                hook(module, Notes())

            spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


if os.environ.get("MEGACORE_NOTES"):
    sys.meta_path.insert(0, Hook())
