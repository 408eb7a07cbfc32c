"""What looks on while steps are taken: torch's profiler, NVTX ranges, and a log of all that ranks say to each other.

Nothing of it is there unless it was asked for, by the run or, while it goes on, by a file PROFILE: the log keeps
nothing else, and the engine gets its own way of doing an instruction back when the last watched step is over.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from megacore.mesh.collectives import gather_objects
from megacore.mesh.group import CommRecord, Ranges
from megacore.mesh.mesh import ParallelMesh
from megacore.monitor.kinds import as_json, merged, table
from megacore.monitor.profile import Profile, Profiled
from megacore.monitor.run_folder import COMMUNICATION, PROFILE
from megacore.train.build import Built
from megacore.train.reporter import Reporter

SUMMARY = "summary.json"
STEPS_AT_ONCE = 3
"""That are profiled when a file asks for it."""


class Watching:
    """Begun before each step and ended after it, on every rank."""

    def __init__(self, built: Built) -> None:
        """Raises ValueError where NVTX ranges are asked for without CUDA."""
        log, self.mesh, self.built = built.config.log, built.mesh, built
        self.out = Path(built.config.out)
        first, last = log.profile or (1, 0)
        self.planned, self.logged = range(first, last + 1), range(1, log.communication + 1)
        self.asked, self.last_step = range(0), built.config.train.steps
        """Steps that a file has asked for; the run's last one."""
        self.mine = not log.profile_ranks or self.mesh.rank in log.profile_ranks
        self.log = self.mesh.world.log
        self.nvtx = log.nvtx
        self.profile: Profile | None = None
        self.stack, self.step_range = ExitStack(), ExitStack()
        self.began = 0
        """Where the profile begins, which may be within the steps asked for, where a run is resumed."""
        if log.nvtx:
            if self.mesh.device.type != "cuda":
                raise ValueError(
                    f"log.nvtx=true marks ranges for a GPU's tools, but the run is on {self.mesh.device.type}; use "
                    "log.profile"
                )
            self.stack.enter_context(self._named(nvtx_range))

    def ask(self, step: int) -> bool:
        """Profile a few steps from ``step`` on, now that all ranks know of the wish; whether that is to be: not while
        others are, or where some would be in between."""
        wanted = range(step, min(step + STEPS_AT_ONCE, self.last_step + 1))
        if not wanted or any(set(wanted).intersection(known) for known in (self.asked, self.planned)):
            return False
        self.asked = wanted
        return True

    def profiled(self, step: int) -> range:
        """The steps that are profiled together with ``step``; none where it is not."""
        return next((known for known in (self.asked, self.planned) if step in known), range(0))

    def begin(self, step: int) -> None:
        """Right before a step."""
        if step in self.logged and self.log is not None:
            self.log.keeps = True
        if self.mine and self.profiled(step):
            if self.profile is None:
                self.began, self.profile = step, Profile(self.mesh.device)
                self.step_range.enter_context(self._named(with_nvtx if self.nvtx else record_function))
            self.step_range.enter_context(record_function(f"step {step}"))

    def end(self, step: int, reporter: Reporter) -> bool:
        """Right after it; whether that took time of its own."""
        if step in self.logged and self.log is not None:
            self.log.keeps = False
            write_log(self.out / COMMUNICATION / f"rank-{self.mesh.rank}.jsonl", step, self.log, self.mesh)
            self.log.clear()
        profiled = self.profiled(step)
        if not profiled:
            return step in self.logged
        if step < profiled[-1]:
            return False
        self._summarise(step, reporter)
        return True

    def close(self) -> None:
        """Let go of everything; a profile that has not come to its end is lost."""
        self.step_range.close()
        self.stack.close()
        if self.profile is not None:
            self.profile.drop()

    def _summarise(self, step: int, reporter: Reporter) -> None:
        """Traces of all ranks that look, and what their time went into; all ranks come here."""
        asked = step in self.asked
        folder = self.out / PROFILE / (f"step-{self.asked[0]:08d}" if asked else "")
        mine: Profiled | None = None
        problem = ""
        if self.profile is not None:
            self.step_range.close()
            profile, self.profile = self.profile, None
            try:
                mine = profile.end(folder / f"rank-{self.mesh.rank}.json.gz")
            except OSError as error:
                problem = f"rank {self.mesh.rank} could not write its profile: {error}"
        all_ranks = gather_objects((mine, problem), self.mesh.world)
        ranks = {rank: each for rank, (each, _) in enumerate(all_ranks) if each is not None}
        first, self.began = max(self.profiled(step)[0], self.began or step), 0
        if self.mesh.rank != 0:
            return
        problems = [each for _, each in all_ranks if each]
        if ranks:
            summary = summary_of(ranks, first, step, self.mesh.device.type)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                problems.append(f"the profile's summary could not be written: {error}")
            reporter.profiled(lines_of(ranks, first, step), folder, summary["kinds"])
        for each in problems[:1]:  # a full disk is no reason to end a run that somebody looks at
            reporter.warn("warning", each, step=step)

    @contextmanager
    def _named(self, ranges: Ranges) -> Iterator[None]:
        """Within, instructions and collectives are ranges."""
        assert self.log is not None
        before, self.log.ranges = self.log.ranges, ranges
        try:
            with self.built.trainer.engine.named(ranges):
                yield
        finally:
            self.log.ranges = before


def nvtx_range(name: str) -> AbstractContextManager[Any]:
    """A range for Nsight Systems."""
    return torch.cuda.nvtx.range(name)


@contextmanager
def with_nvtx(name: str) -> Iterator[None]:
    """A range for both."""
    with record_function(name), nvtx_range(name):
        yield


def write_log(path: Path, step: int, records: Sequence[CommRecord], mesh: ParallelMesh) -> None:
    """Add a step's collectives and messages to a file, one line each, in the order in which they were begun.

    Keys: step, axis, communicator (its ranks), operation, bytes (of the whole tensor), dtype, stream; of messages also
    peer (a rank).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w" if step == 1 else "a", encoding="utf-8") as file:
        for record in records:
            ranks = getattr(mesh, record.axis).ranks
            line = {
                "step": step,
                "axis": record.axis,
                "communicator": ranks,
                "operation": record.operation,
                "bytes": record.num_bytes,
                "dtype": str(record.dtype).removeprefix("torch."),
                "stream": record.stream,
            }
            if record.peer >= 0:
                line["peer"] = ranks[record.peer]
            file.write(json.dumps(line) + "\n")


def summary_of(ranks: dict[int, Profiled], first: int, last: int, device: str) -> dict[str, Any]:
    """For programs: milliseconds per step and shares, the mean over ranks and each rank's own."""
    number = last - first + 1
    return {
        "steps": [first, last],
        "device": device,
        "step_ms": round(sum(each.span_ms for each in ranks.values()) / len(ranks) / number, 4),
        "kinds": as_json(merged([each.kinds for each in ranks.values()]), number),
        "ranks": {
            str(rank): {
                "step_ms": round(each.span_ms / number, 4),
                "kinds": as_json(each.kinds, number),
                "instructions_ms": {op: round(ms / number, 4) for op, ms in each.instructions.items()},
            }
            for rank, each in ranks.items()
        },
    }


def lines_of(ranks: dict[int, Profiled], first: int, last: int) -> list[str]:
    """For people."""
    number = last - first + 1
    kinds = merged([each.kinds for each in ranks.values()])
    mean = sum(each.span_ms for each in ranks.values()) / len(ranks) / number
    over = f", mean of {len(ranks)} ranks" if len(ranks) > 1 else ""
    return [f"steps {first} to {last}, {mean:.1f} ms each{over}", *table(kinds, number)]
