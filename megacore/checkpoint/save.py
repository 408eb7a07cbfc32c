"""Saves checkpoints beside training: state is copied, a thread writes the copy, and training goes on.

    all ranks            rank 0
    copy own slices
    (thread) say how many bytes -> is there room? -> go on, or all give up
    (thread) write, fsync, say what was written -> fsync folder, write manifest, rename, old ones go
    (thread) hear whether it is a checkpoint now

Threads of all ranks meet in a group of their own, so training's collectives are not disturbed. Until the manifest is
renamed into place, everything before it is whatever a killed run left behind, and the checkpoint before it is whole.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from megacore.checkpoint.find import LATEST, folder_of
from megacore.checkpoint.manifest import MANIFEST, TRAINING
from megacore.checkpoint.parts import Part
from megacore.checkpoint.retain import Retention, prune, remove_unfinished
from megacore.checkpoint.store import Store
from megacore.checkpoint.write import Planned, WrittenFile, commit, write_file
from megacore.config.schema import RunConfig
from megacore.mesh.collectives import gather_objects
from megacore.mesh.group import Group

ROOM = 1 << 26
"""Bytes that must be left on a disk beside the checkpoint: for manifest, attachments and logs."""


PROBE = "probe"
"""A file that is written and removed."""


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says besides its tensors; rank 0's counts."""

    step: int
    config: RunConfig
    layout: Mapping[str, int]
    state: Mapping[str, Any]
    attachments: Mapping[str, bytes]


@dataclass(frozen=True)
class Outcome:
    """What became of a save: ``problem`` is '' or why there is no checkpoint of this step; ``removed`` are the folders
    that had to go; ``remark`` is '' or what went wrong when the checkpoint was there. Equal on all ranks."""

    step: int
    folder: str
    num_bytes: int
    seconds: float
    problem: str = ""
    removed: tuple[str, ...] = ()
    remark: str = ""


@dataclass(frozen=True)
class Answer:
    """Those fields of an outcome that rank 0 alone can tell."""

    problem: str = ""
    removed: tuple[str, ...] = ()
    remark: str = ""


class Saver:
    """Writes a rank's slices. ``group`` is for this alone, over gloo, of all ranks; ``clock`` gives seconds."""

    def __init__(
        self,
        store: Store,
        parts: Sequence[Part],
        group: Group,
        retention: Retention,
        in_background: bool,
        clock: Callable[[], float],
    ) -> None:
        self.store, self.parts, self.group, self.retention = store, list(parts), group, retention
        self.in_background, self.clock = in_background, clock
        self.planned = [Planned(part.key, part.shape, part.start, part.size, part.dtype) for part in self.parts]
        self.num_bytes = sum(plan.num_bytes for plan in self.planned)
        self.staged: list[Tensor] = []
        self.thread: Thread | None = None
        self.outcome: Outcome | None = None

    def preflight(self) -> None:
        """Before any work is done: raise ValueError, on all ranks, where a checkpoint cannot be written."""
        total = sum(gather_objects(self.num_bytes, self.group))
        problem = ""
        if self.group.rank == 0:
            try:
                self.store.replace(PROBE, b"written at the start of a run, to see that it can be\n")
                self.store.remove(PROBE)
                problem = self._room_problem(total)
            except Exception as reason:  # of whatever kind: all ranks must hear of it
                problem = f"checkpoints cannot be written to {self.store.describe()} ({reason})"
        if problem := gather_objects(problem, self.group)[0]:
            raise ValueError(f"{problem}; or name another place with checkpoint.folder")

    def _room_problem(self, total: int) -> str:
        """Why so many bytes do not fit, or ''."""
        free = self.store.free_bytes()
        if free is None or free >= total + ROOM:
            return ""
        return f"{self.store.describe()} has {free} bytes left, a checkpoint takes {total}; free some"

    @torch.no_grad()
    def start(self, facts: Facts) -> None:
        """Begin to save; an earlier save is waited for first, and ``take`` must have been asked for it.

        When this returns, state may change: in the background a copy is written, else all of it has been.
        """
        assert self.thread is None and self.outcome is None, "the outcome of the save before was not taken"
        began = self.clock()
        if not self.in_background:
            self._work(facts, (part.values().cpu().contiguous() for part in self.parts), began)
            return
        self._stage()
        ready = _device_is_done(self.parts)
        self.thread = Thread(target=self._work, args=(facts, self.staged, began, ready), name="checkpoint")
        self.thread.start()

    def take(self, wait: bool = False) -> Outcome | None:
        """What became of the save that was begun, once; None if it goes on, or if there was none."""
        if self.thread is not None:
            if wait:
                self.thread.join()
            if self.thread.is_alive():
                return None
            self.thread = None
        outcome, self.outcome = self.outcome, None
        return outcome

    def wait(self, seconds: float) -> None:
        """Until the save that was begun has ended, if there is one; so long at most."""
        if self.thread is not None:
            self.thread.join(seconds)

    def _stage(self) -> None:
        """Copy the slices into memory that is kept from save to save."""
        if not self.staged:
            pinned = any(part.tensor.device.type == "cuda" for part in self.parts)
            self.staged = [torch.empty(part.size, dtype=part.dtype, pin_memory=pinned) for part in self.parts]
        for part, copy in zip(self.parts, self.staged, strict=True):
            copy.copy_(part.values(), non_blocking=True)

    def _work(self, facts: Facts, tensors: Any, began: float, ready: Callable[[], None] | None = None) -> None:
        """All of a save; whatever happens becomes its outcome, on all ranks."""
        folder = self.store.child(folder_of(facts.step))
        total, answer = 0, Answer()
        try:
            if ready is not None:
                ready()
            total, problem = self._has_room(folder)
            answer = Answer(problem) if problem else self._commit(folder, facts, self._write(folder, tensors))
        except Exception as error:  # the others have gone: training will say why
            answer = Answer(f"{type(error).__name__}: {error}")
        seconds = self.clock() - began
        self.outcome = Outcome(
            facts.step, folder.describe(), total, seconds, answer.problem, answer.removed, answer.remark
        )

    def _has_room(self, folder: Store) -> tuple[int, str]:
        """(bytes of all ranks, why they cannot be written or '')."""
        total = sum(gather_objects(self.num_bytes, self.group))
        problem = ""
        if self.group.rank == 0:
            try:
                remove_unfinished(self.store)  # what killed saves left behind
                if folder.names():
                    folder.remove_all(first=MANIFEST)
                problem = self._room_problem(total)
            except Exception as error:  # of whatever kind: all ranks must hear of it
                problem = f"rank 0: {type(error).__name__}: {error}"
        return total, gather_objects(problem, self.group)[0]

    def _write(self, folder: Store, tensors: Any) -> list[WrittenFile | str]:
        """What every rank has written, or why it could not."""
        own: WrittenFile | str
        try:
            own = write_file(folder, f"rank-{self.group.rank:05d}.safetensors", self.planned, tensors)
        except Exception as error:  # of whatever kind: all ranks must hear of it
            own = f"rank {self.group.rank}: {type(error).__name__}: {error}"
        return gather_objects(own, self.group)

    def _commit(self, folder: Store, facts: Facts, written: list[WrittenFile | str]) -> Answer:
        """Make it a checkpoint, if all ranks have written their part; rank 0's answer, on all of them."""
        answer = Answer()
        if self.group.rank == 0:
            problems = [each for each in written if isinstance(each, str)]
            if not problems:
                try:
                    self._make_checkpoint(folder, facts, written)
                except Exception as error:
                    problems = [f"rank 0: {type(error).__name__}: {error}"]
            if problems:
                with suppress(Exception):  # the space is wanted back; if that fails, the next save tries again
                    remove_unfinished(self.store)
                answer = Answer("; ".join(problems))
            else:
                answer = self._tidy(facts)
        return gather_objects(answer, self.group)[0]

    def _make_checkpoint(self, folder: Store, facts: Facts, written: list[Any]) -> None:
        commit(
            folder,
            [each for each in written if each.slices],
            kind=TRAINING,
            step=facts.step,
            config=facts.config,
            layout=facts.layout,
            state=facts.state,
            attachments=facts.attachments,
        )

    def _tidy(self, facts: Facts) -> Answer:
        """Point to the new checkpoint and remove what it replaces. If that fails, it is there all the same."""
        try:
            self.store.replace(LATEST, f"{folder_of(facts.step)}\n".encode())
            return Answer(removed=prune(self.store, self.retention))
        except Exception as error:
            return Answer(remark=f"{type(error).__name__}: {error}")


def _device_is_done(parts: Sequence[Part]) -> Callable[[], None] | None:
    """Waits until copies that a device makes are there."""
    if not any(part.tensor.device.type == "cuda" for part in parts):
        return None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize
