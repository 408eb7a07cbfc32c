"""What looks on while steps are taken: torch's profiler, NVTX ranges, and a log of all that ranks say to each other.

Nothing of it is there unless it was asked for: `build` hands the mesh a log only then, and the engine gets its own way
of doing an instruction back when the last watched step is over.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from megacore.mesh.collectives import agree, gather_objects
from megacore.mesh.group import CommRecord, Ranges
from megacore.mesh.mesh import ParallelMesh
from megacore.monitor.kinds import as_json, merged, table
from megacore.monitor.profile import Profile, Profiled
from megacore.monitor.run_folder import COMMUNICATION, PROFILE
from megacore.train.build import Built
from megacore.train.reporter import Reporter

SUMMARY = "summary.json"


class Watching:
    """Begun before each step and ended after it, on every rank."""

    def __init__(self, built: Built) -> None:
        """Raises ValueError where NVTX ranges are asked for without CUDA."""
        log, self.mesh, self.built = built.config.log, built.mesh, built
        self.out = Path(built.config.out)
        first, last = log.profile or (1, 0)
        self.profiled, self.logged = range(first, last + 1), range(1, log.communication + 1)
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

    def begin(self, step: int) -> None:
        """Right before a step."""
        if step in self.logged and self.log is not None:
            self.log.keeps = True
        if step in self.profiled and self.mine:
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
        if step not in self.profiled:
            return step in self.logged
        if step < self.profiled[-1]:
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
        mine: Profiled | None = None
        error: OSError | None = None
        if self.profile is not None:
            self.step_range.close()
            profile, self.profile = self.profile, None
            try:
                mine = profile.end(self.out / PROFILE / f"rank-{self.mesh.rank}.json.gz")
            except OSError as reason:
                error = reason
        agree(error, self.mesh.world)
        ranks = {rank: each for rank, each in enumerate(gather_objects(mine, self.mesh.world)) if each is not None}
        if self.mesh.rank == 0:
            first = max(self.profiled[0], self.began or step)
            summary = summary_of(ranks, first, step, self.mesh.device.type)
            (self.out / PROFILE).mkdir(parents=True, exist_ok=True)
            (self.out / PROFILE / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
            reporter.profiled(lines_of(ranks, first, step), self.out / PROFILE, summary["kinds"])

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
