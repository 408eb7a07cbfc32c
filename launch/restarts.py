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


def with_restarts(
    config: RunConfig,
    attempt: Callable[[RunConfig, Callable[[Failure], None]], int],
    limit: int = MAX_RESTARTS,
    write: Callable[[str], object] = sys.stderr.write,
) -> int:
    """The exit code of ``attempt(config, tell)``, which tells the failure behind a fault; after one it is made again
    from the newest checkpoint, but not more than ``limit`` times in a row without a newer one.

    What is not a fault is final: success, wrong input, a stop that was asked for. Runs that save nothing begin anew at
    most by hand.
    """
    failures: list[Failure] = []
    first = newest = newest_step(config)
    in_vain = 0
    while True:
        code = attempt(config, failures.append)
        if code != FAULT or not limit or not config.checkpoint.save_every:
            return code
        before, newest = newest, newest_step(config)
        in_vain = 1 if newest > before else in_vain + 1
        what = failures[-1].summary if failures else "unknown"
        if in_vain > limit:
            write(
                f"megacore: the run has been started {limit} times from step {newest} and came to no newer checkpoint; "
                f"the last fault: {what}. Mend it, then the same command goes on\n"
            )
            return code
        if newest != first:  # checkpoints of this very command: go on from them, whatever was asked for
            config = replace(config, checkpoint=replace(config.checkpoint, resume="auto"))
        note(config, newest, in_vain, what)
        write(
            f"megacore: starting again from step {newest} (restart {in_vain} of {limit} without a newer checkpoint)\n"
        )


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
