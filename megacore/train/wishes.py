"""What is asked of a run from outside: to stop, to save, by a signal or by a file in its folder.

One rank hears of it first, and all must do it after the same step. So each brings what it has heard to the sum that
ends a step (``Trainer.step``), and all read the answer one step later, as they read its figures.

    SIGTERM, SIGUSR1, SIGINT, or a file STOP    save after this step, then leave with exit code 75
    SIGUSR2, or a file SAVE                     save after this step
    a file PROFILE                              profile the next few steps (``train.watching``)

Schedulers send these: Slurm's --signal and scancel, Kubernetes before it evicts a pod, torchrun when it is told to end.
A second SIGINT ends the process at once. Rank 0 looks for the files, twice a second at most. It removes them when it is
done with them; one that cannot be removed counts once, until it is made anew.
"""

import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from megacore.monitor.run_folder import PROFILE_NOW, SAVE, STOP

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAVE_SIGNALS = (signal.SIGUSR2,)
FILES = (STOP, SAVE, PROFILE_NOW)
SAVE_NAMES = frozenset((SAVE, *(number.name for number in SAVE_SIGNALS)))
LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class Asked:
    """What all ranks together ask for: how many of them."""

    stop: int = 0
    save: int = 0
    profile: int = 0

    @classmethod
    def of(cls, sums: Tensor) -> "Asked":
        """From the sum over all ranks; waits for the device."""
        return cls(*(round(each) for each in sums.tolist()))


class Wishes:
    """What one rank has heard and not yet passed on."""

    def __init__(
        self, out: Path, looks: bool, device: torch.device, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``looks``: whether this rank watches the files in ``out``."""
        self.out, self.looks, self.device, self.clock = out, looks, device, clock
        self.heard: list[str] = []
        """Names of signals and files that are not done with yet, in order."""
        self.looked = -LOOK_EVERY_S
        self._asked, self._wishes = (False, False, False), torch.zeros(3, dtype=torch.float64, device=device)
        self._done: dict[str, int] = {}
        """Files that cannot be removed, and when they were made."""
        self._remove(*FILES)  # what lies there was meant for a run before this one

    @contextmanager
    def listening(self, for_good: bool = False) -> Iterator[None]:
        """Signals are wishes meanwhile; Python allows this in the main thread only. What was ignored stays so.

        ``for_good``: this process ends with the run, and must not die of a second signal on its way out.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, *SAVE_SIGNALS)}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number, handler in before.items() if not for_good else ():
                signal.signal(number, handler)

    def now(self) -> Tensor:
        """[stop, save, profile] on the device: 1 where this rank was asked for it, until it is done."""
        if self.looks and self.clock() - self.looked >= LOOK_EVERY_S:
            self.looked = self.clock()
            self.heard += [name for name in FILES if name not in self.heard and self._is_new(name)]
        heard = set(self.heard)
        asked = (bool(heard - SAVE_NAMES - {PROFILE_NOW}), bool(heard & SAVE_NAMES), PROFILE_NOW in heard)
        if asked != self._asked:
            self._asked = asked
            self._wishes = torch.tensor(asked, dtype=torch.float64, device=self.device)
        return self._wishes

    def saved(self) -> None:
        """A save has begun that has all that was asked for before."""
        for name in [name for name in self.heard if name in SAVE_NAMES]:
            self.heard.remove(name)  # in place: a signal may come at any moment
        self._remove(SAVE)

    def profiling(self) -> None:
        """A profile has begun."""
        with suppress(ValueError):
            self.heard.remove(PROFILE_NOW)
        self._remove(PROFILE_NOW)

    def stopped(self) -> None:
        """The run is about to leave, as was asked."""
        self._remove(STOP)

    def _made(self, name: str) -> int | None:
        """When a file was made, in nanoseconds; None where there is none (a folder is none)."""
        try:
            found = (self.out / name).stat()
        except OSError:
            return None
        return found.st_mtime_ns if stat.S_ISREG(found.st_mode) else None

    def _is_new(self, name: str) -> bool:
        made = self._made(name)
        return made is not None and made != self._done.get(name)

    def _remove(self, *names: str) -> None:
        for name in names if self.looks else ():
            if (made := self._made(name)) is None:
                continue
            try:
                (self.out / name).unlink()
            except OSError:
                self._done[name] = made

    def _hear(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and name in self.heard:
            raise KeyboardInterrupt
        self.heard.append(name)
