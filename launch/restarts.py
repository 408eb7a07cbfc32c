"""Starts a run's ranks again after a fault, as long as the run gets on. Imports no torch."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megacore.checkpoint.find import checkpoints_of, steps_in
from megacore.checkpoint.store import open_store
from megacore.config.schema import RunConfig
from megacore.launch.failures import Failure
from megacore.monitor.metrics import EventsWriter

MAX_RESTARTS = 3
"""So often without a newer checkpoint."""
FAULT = 1


class Restarts:
    """Counts those that led nowhere."""

    def __init__(
        self, config: RunConfig, limit: int = MAX_RESTARTS, write: Callable[[str], object] = sys.stderr.write
    ) -> None:
        """``limit``: so many without a newer checkpoint than the run has now; 0: none at all."""
        self.config, self.limit, self.write = config, limit, write
        self.first = self.newest = newest_step(config)
        self.in_vain = 0

    @property
    def got_on(self) -> bool:
        """Whether there are checkpoints of this very command: it goes on from them, whatever was asked for."""
        return self.newest != self.first

    def another(self, what: str, speaks: bool = True) -> bool:
        """Whether to start again after the fault ``what``. ``speaks``: say so and write it down; of a job's nodes one
        does. Runs that save nothing begin anew at most by hand."""
        if not self.limit or not self.config.checkpoint.save_every:
            return False
        before, self.newest = self.newest, newest_step(self.config)
        self.in_vain = 1 if self.newest > before else self.in_vain + 1
        if self.in_vain > self.limit:
            self.write(
                f"megacore: the run has been started {self.limit} times from step {self.newest} and came to no newer "
                f"checkpoint; the last fault: {what}. Mend it, then the same command goes on\n"
            )
            return False
        if speaks:
            note(self.config, self.newest, self.in_vain, what)
            self.write(
                f"megacore: starting again from step {self.newest} (restart {self.in_vain} of {self.limit} without a "
                "newer checkpoint)\n"
            )
        return True


def with_restarts(
    config: RunConfig,
    attempt: Callable[[RunConfig, Callable[[Failure], None]], int],
    limit: int = MAX_RESTARTS,
    write: Callable[[str], object] = sys.stderr.write,
) -> int:
    """The exit code of ``attempt(config, tell)``, which tells the failure behind a fault; after one it is made again
    from the newest checkpoint, but not more than ``limit`` times in a row without a newer one.

    What is not a fault is final: success, wrong input, a stop that was asked for.
    """
    failures: list[Failure] = []
    restarts = Restarts(config, limit, write)
    while True:
        code = attempt(config, failures.append)
        if code != FAULT or not restarts.another(failures[-1].summary if failures else "unknown"):
            return code
        if restarts.got_on:
            config = replace(config, checkpoint=replace(config.checkpoint, resume="auto"))


def newest_step(config: RunConfig) -> int:
    """The step of the newest finished checkpoint, 0 if there is none."""
    return max(
        (step for step, _, is_finished in steps_in(open_store(checkpoints_of(config))) if is_finished), default=0
    )


def note(config: RunConfig, step: int, number: int, cause: str) -> None:
    """Write it down where the run writes its events."""
    if Path(config.out).is_dir():
        events = EventsWriter(Path(config.out))
        events.write("restart", step=step, in_vain=number, cause=cause)
        events.close()
