"""What a run keeps and goes on from: which checkpoint is taken up at the start, and when state is saved."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacore.checkpoint.find import ASIDE, CHECKPOINTS, LATEST, checkpoints_of, folder_of, step_of, steps_in
from megacore.checkpoint.hf.folder import TOKENIZER
from megacore.checkpoint.hf.same_tokenizer import HASH, is_same, joined
from megacore.checkpoint.manifest import MANIFEST, TRAINING
from megacore.checkpoint.opening import open_weights
from megacore.checkpoint.read import Checkpoint
from megacore.checkpoint.retain import EVALUATION_DUE, VAL_LOSS, Retention, remove_unfinished
from megacore.checkpoint.save import Facts, Outcome, Saver
from megacore.checkpoint.store import Store, open_store
from megacore.checkpoint.write import amend
from megacore.config.changes import SAFE, Change, changes, model_problems, refuse
from megacore.config.errors import ConfigError
from megacore.mesh.collectives import agree, gather_objects
from megacore.train.exporting import Exporter
from megacore.train.failpoints import Failpoints
from megacore.train.state import State

if TYPE_CHECKING:
    from megacore.train.build import Built
    from megacore.train.data import RunData
    from megacore.train.reporter import Reporter


CLOSING_S = 60.0
"""How long a run that fails may wait for a save that is under way."""


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on. ``own``: from its own folder, whose files go on, too. ``rejected``: newer checkpoints that
    could not be used, and why."""

    what: str
    step: int
    state: Mapping[str, Any]
    own: bool
    changes: tuple[Change, ...]
    rejected: tuple[str, ...]

    @property
    def samples(self) -> int:
        """Ordinals below this have been trained on."""
        return int(self.state["samples"])

    @property
    def unevaluated(self) -> Mapping[str, Any]:
        """The figures of the step, as JSON holds them, where a stop of this very run left its evaluation out."""
        found: Mapping[str, Any] = self.state.get(EVALUATION_DUE, {}) if self.own else {}
        return found

    def lines(self) -> Iterator[str]:
        """What a person should know."""
        for reason in self.rejected:
            yield f"warning  passed over: {reason}"
        yield f"resume   step {self.step}, from {self.what}"
        for change in self.changes:
            yield f"{'         ' if change.kind == SAFE else 'warning  '}{change}"


class Keeper:
    """Checkpoints of one run. All ranks call everything, in the same order."""

    def __init__(self, built: Built, failpoints: Failpoints, state: State) -> None:
        self.config, self.world, self.built = built.config, built.mesh.world, built
        self.rank = built.mesh.rank
        self.failpoints = failpoints
        self.store = open_store(checkpoints_of(self.config), failpoints.notice)
        self.state = state
        self.goes_on_from = 0
        self.saver: Saver | None = None
        self.attachments: Mapping[str, bytes] = {}
        self.other_tokenizer = False
        """Whether the weights that the run begins with came with another tokenizer than its own."""
        self.last: Outcome | None = None
        self.exporter: Exporter | None = None

    def resume(self) -> Resumed | None:
        """Take up the newest whole checkpoint that ``checkpoint.resume`` allows; None where the run begins anew.

        Raises ValueError where there should be one and none is whole, ConfigError where the run does not fit it.
        """
        resume = self.config.checkpoint.resume
        if resume == "never":
            return None
        where = self.store if resume == "auto" else open_store(resume)
        rejected: list[str] = []
        folders, were_there = self._candidates(where)
        for folder in folders:
            taken = self._take_up(folder)
            if isinstance(taken, str):
                rejected.append(taken)
                continue
            own = _place(folder).parent == _place(self.store)
            self.goes_on_from = taken.manifest.step if own else 0
            self.attachments = taken.attachments
            found = changes(taken.config, self.config)
            return Resumed(taken.what, taken.manifest.step, taken.manifest.state, own, tuple(found), tuple(rejected))
        if rejected or resume != "auto" or were_there:
            reasons = "".join(f"\n  {reason}" for reason in rejected)
            raise ValueError(
                f"checkpoint.resume={resume}: {where.describe()} holds no whole checkpoint; restore one, or set "
                f"checkpoint.resume=never to begin anew{reasons}"
            )
        return None

    def begin_from(self, path: str) -> str:
        """Take weights from ``checkpoint.init_from``; returns what that is. Raises ValueError where they do not fit."""
        error, what = None, ""
        try:
            source = open_weights(path)
            what, self.attachments = source.what, source.attachments
            if problems := model_problems(source.model, self.config.model, what):
                raise ConfigError(problems)
            self.state.load_weights(source)
        except (ValueError, OSError) as reason:
            error = reason
        agree(error, self.world)
        self.state.publish()
        return what

    def prepare(self, tokenizer: Mapping[str, bytes]) -> None:
        """Make room for checkpoints, now that it is certain that the run begins, and get ready to save, if that will be
        due; the files of the ``tokenizer`` go with each checkpoint."""
        self._put_aside(self.goes_on_from)
        c, spec = self.config.checkpoint, self.config.data.tokenizer
        theirs = any(name.startswith(TOKENIZER) for name in self.attachments)
        self.other_tokenizer = bool(theirs and spec) and not is_same(self.attachments, tokenizer, spec)
        self.attachments = joined(self.attachments, tokenizer, spec)
        if not (c.save_every or c.export_hf_every):
            return
        self.saver = self._saver()
        self.saver.preflight()
        if c.export_hf_every and self.rank == 0:
            self.exporter = Exporter(self.store, Path(self.config.out) / "hf", c.export_dtype, self.retention)

    @property
    def retention(self) -> Retention:
        """Which checkpoints stay."""
        c = self.config.checkpoint
        return Retention(c.keep, c.keep_every, c.keep_best)

    def _saver(self) -> Saver:
        parts, beside = self.state.own_parts(), self.built.mesh.beside()
        return Saver(self.store, parts, beside, self.retention, self.config.checkpoint.async_save, time.perf_counter)

    def check_data(self, resumed: Resumed, data: RunData) -> None:
        """Raise ConfigError where samples, or what their tokens stand for, are no more what they were."""
        before, now = resumed.state.get(HASH), data.tokenizer
        if before and now is not None and now.hash != before:
            raise ConfigError(
                [
                    f"data.tokenizer={now.spec!r} is not the tokenizer that {resumed.what} was trained with (content "
                    f"hash {before[:12]} then, {now.hash[:12]} now): its ids would mean other text; give back that "
                    "one, or start anew from the weights with checkpoint.init_from"
                ]
            )
        if resumed.state["data"] != data.identity:
            raise ConfigError(
                [
                    f"data.blend: the data sets, their weights or their split are not those that {resumed.what} was "
                    "trained on, so samples would be lost or met twice; give back the same data, or start anew from "
                    "its weights with checkpoint.init_from"
                ]
            )

    def newest_before(self, step: int, reporter: Reporter) -> int:
        """The step of the newest checkpoint before ``step``, once what is being saved is; 0 if there is none."""
        if self.saver is not None:
            self._report(self.saver.take(wait=True), reporter)
        folders, _ = self._candidates(self.store)
        found = (step_of(_place(folder).name) or 0 for folder in folders)
        return max((each for each in found if each < step), default=0)

    def put_aside(self, step: int) -> None:
        """Steps after ``step`` are about to be made anew: their checkpoints make room, unfinished saves go."""
        self._put_aside(step)

    def save(
        self,
        step: int,
        data: RunData,
        reporter: Reporter,
        val_loss: float | None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin to save the state after ``step``, whose figures must have been reported, and ``more``, as JSON."""
        if self.saver is None:  # no save was due, but the run is asked to stop
            self.saver = self._saver()
        self._report(self.saver.take(wait=True), reporter)
        layout = self.built.mesh.layout
        axes = ("tp", "pp", "dp", "cp", "ep", "etp", "dp_shard", "chunks", "zero", "world")
        state: dict[str, Any] = {
            "samples": data.plan.num_samples(step),
            "tokens": reporter.tokens,
            "skipped": reporter.skipped if self.rank == 0 else 0,
            "data": data.identity,
            HASH: "" if data.tokenizer is None else data.tokenizer.hash,
        }
        state |= more or {}
        if val_loss is not None and math.isfinite(val_loss):  # no other number is the best of any, or JSON
            state[VAL_LOSS] = val_loss
        sizes = {axis: getattr(layout, axis) for axis in axes}
        self.failpoints.begin_save(step)
        self.saver.start(Facts(step, self.config, sizes, state, self.attachments))
        if not self.config.checkpoint.async_save:
            self.poll(reporter)

    def evaluated(self, resumed: Resumed, val_loss: float, reporter: Reporter) -> None:
        """The evaluation that was due after the step from which the run goes on has been made up: the checkpoint gets
        it, too. Saving it again would take the only good one away first."""
        state = {name: value for name, value in resumed.state.items() if name != EVALUATION_DUE}
        if math.isfinite(val_loss):
            state[VAL_LOSS] = val_loss
        if self.rank == 0:
            try:
                amend(self.store.child(folder_of(resumed.step)), state)
            except Exception as reason:  # of whatever kind: the others go on, and what is due is made up once more
                text = f"{resumed.what} could not be told its validation loss: {type(reason).__name__}: {reason}"
                reporter.warn("warning", text, step=resumed.step)

    def poll(self, reporter: Reporter) -> None:
        """Report a save that has ended; does not wait."""
        if self.saver is not None:
            self._report(self.saver.take(), reporter)

    def finish(self, reporter: Reporter) -> None:
        """Wait for what goes on. Raises RuntimeError where the last state could not be saved."""
        if self.saver is not None:
            self._report(self.saver.take(wait=True), reporter)
        if self.exporter is not None:
            reporter.exported(self.exporter.take(wait=True))
        if self.last is not None and self.last.problem:
            raise RuntimeError(f"step {self.last.step} could not be saved: {self.last.problem}")

    def close(self) -> None:
        """Let a save end that goes on while this rank is about to leave: the others write their part of it."""
        if self.saver is not None:
            self.saver.wait(CLOSING_S)

    def _report(self, outcome: Outcome | None, reporter: Reporter) -> None:
        if outcome is None:
            return
        self.last = outcome
        reporter.saved(outcome)
        every = self.config.checkpoint.export_hf_every
        due = every and (outcome.step % every == 0 or outcome.step == self.config.train.steps)
        if self.exporter is not None and due and not outcome.problem:
            reporter.exported(self.exporter.take(wait=True))
            self.exporter.start(outcome.step)

    def _candidates(self, where: Store) -> tuple[list[Store], bool]:
        """(folders of finished checkpoints, newest first; whether there is a ``latest`` that speaks of some): rank 0
        looks, so that all see the same."""
        found: tuple[list[tuple[str, ...]], bool] = [], False
        error: Exception | None = None
        if self.rank == 0:
            try:
                found = _finished(where)
            except OSError as reason:
                error = ValueError(f"checkpoint.resume: {where.describe()} cannot be read: {reason}; make it readable")
            except Exception as reason:  # of whatever kind: the others wait
                error = reason
        agree(error, self.world)
        paths, were_there = gather_objects(found, self.world)[0]
        return [_below(where, path) for path in paths], were_there

    def _take_up(self, folder: Store) -> Checkpoint | str:
        """The checkpoint, loaded, or why that cannot be, the same on all ranks."""
        checkpoint, problem = None, ""
        try:
            checkpoint = Checkpoint.of(folder)
        except (ValueError, OSError) as reason:
            problem = str(reason)
        if problem := self._first(problem):
            return problem
        assert checkpoint is not None
        if checkpoint.manifest.kind != TRAINING:
            raise ValueError(
                f"checkpoint.resume: {checkpoint.what} holds weights alone; start from them with checkpoint.init_from"
            )
        refuse(changes(checkpoint.config, self.config), checkpoint.what)
        if problem := self._first(self.state.lacking(checkpoint)):
            raise ConfigError([problem])
        try:
            self.state.load(checkpoint)
            assert checkpoint.attachments is not None  # read, and so verified, now
        except (ValueError, OSError) as reason:
            problem = str(reason)
        if problem := self._first(problem):
            return problem
        self.state.publish()
        return checkpoint

    def _first(self, problem: str) -> str:
        """The first rank's problem that has one, on all ranks."""
        return next((each for each in gather_objects(problem, self.world) if each), "")

    def _put_aside(self, step: int) -> None:
        """Steps after ``step`` are about to be made anew: their checkpoints make room, unfinished saves go."""
        error: Exception | None = None
        if self.rank == 0:
            try:
                _put_aside(self.store, step)
            except OSError as reason:
                error = ValueError(f"{self.store.describe()} cannot be changed: {reason}; make it writable")
            except Exception as reason:  # of whatever kind: the others wait
                error = reason
        agree(error, self.world)


def _below(store: Store, names: tuple[str, ...]) -> Store:
    """The folder to which names lead."""
    return reduce(lambda folder, name: folder.child(name), names, store)


def _finished(where: Store) -> tuple[list[tuple[str, ...]], bool]:
    """As ``Keeper._candidates``, each folder as the names that lead to it."""
    if MANIFEST in where.names():
        return [()], False
    inner: tuple[str, ...] = (CHECKPOINTS,) if CHECKPOINTS in where.folders() else ()
    store = _below(where, inner)
    steps = [step for step, _, is_finished in steps_in(store) if is_finished]
    return [(*inner, folder_of(step)) for step in steps], LATEST in store.names()


def _put_aside(store: Store, step: int) -> None:
    """As ``Keeper._put_aside``. At every moment ``latest`` is right, or there is something to go on from."""
    remove_unfinished(store)
    has_latest = LATEST in store.names()
    if has_latest and not step:
        store.remove(LATEST)
    taken = set(store.child(ASIDE).folders())
    for other, _, _ in list(steps_in(store)):
        if other > step:
            name = next(n for i in range(1, len(taken) + 2) if (n := f"{folder_of(other)}-{i}") not in taken)
            store.move_folder(folder_of(other), f"{ASIDE}/{name}")
    if has_latest and step:
        store.replace(LATEST, f"{folder_of(step)}\n".encode())


def _place(store: Store) -> Path:
    """To be compared with another store's."""
    return Path(os.path.realpath(store.describe()) if "://" not in store.describe() else store.describe())
