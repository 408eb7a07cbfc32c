"""Saving and loading the state of a sharded run: the engine's checkpoints against torch.distributed.checkpoint.

Both sides hold the same number of bytes in the same processes (weights and two moments in fp32, cut over the ranks: our
ZeRO-3, FSDP2) and take turns (see `harness`). Files go to one folder and are durable when a save ends. Ours are hashed
on the way out and verified on the way in; torch's have no hashes.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import distributed

from megacore.bench.baselines.dcp import Checkpointed
from megacore.bench.harness import Comparison, alternate, case_named, comparison
from megacore.bench.ranks import time_on_all
from megacore.bench.train import OURS
from megacore.checkpoint.find import folder_of
from megacore.checkpoint.read import Checkpoint
from megacore.checkpoint.retain import Retention
from megacore.checkpoint.save import Facts, Saver
from megacore.checkpoint.store import LocalStore
from megacore.config.resolve import resolve
from megacore.config.schema import ParallelConfig, RunConfig
from megacore.mesh.rank_info import RankInfo
from megacore.train.build import build
from megacore.train.state import State

BYTES = "bytes"
DCP, COPY = "torch.distributed.checkpoint", "a copy in memory"
SHAPE = (
    "model.num_layers=8",
    "model.hidden_size=512",
    "model.ffn_hidden_size=1408",
    "model.num_heads=8",
    "model.num_kv_heads=8",
    "model.vocab_size=32000",
    "train.seq_len=256",
    "train.global_batch_size=2",
)
"""59 million parameters, 700 MB of state."""


@dataclass(frozen=True)
class Case:
    """What is timed: ``save`` (until durable), ``stall`` (of a save in the background, until training may go on),
    ``background`` (the same until durable) or ``load``."""

    name: str
    num_ranks: int = 2


CASES = (Case("save"), Case("stall"), Case("background"), Case("load"))


class Sides:
    """Both sides' state on a rank, and what can be timed of it."""

    def __init__(self, info: RankInfo, config: RunConfig, folder: Path) -> None:
        built = build(config, info, torch.device("cpu"))
        self.state, self.folder, self.count = State(built), folder, 0
        self.config = built.config
        self.savers: dict[bool, Saver] = {}
        group = built.mesh.beside()
        for in_background in (False, True):
            self.savers[in_background] = Saver(
                LocalStore(folder / OURS), self.state.own_parts(), group, Retention(1), in_background, time.perf_counter
            )
        theirs = distributed.new_group(backend="gloo")
        mesh = distributed.device_mesh.init_device_mesh("cpu", (info.world_size,))
        self.theirs = Checkpointed(config, mesh, theirs)
        self.waiting: list[Callable[[], object]] = []

    @property
    def num_bytes(self) -> int:
        """This rank's part of what we write."""
        return self.savers[False].num_bytes

    def next_folder(self) -> Path:
        """Not used before; the same on all ranks."""
        self.count += 1
        return self.folder / DCP / str(self.count)

    def settle(self) -> None:
        """Between two timings: what goes on ends, what was written goes, all ranks meet."""
        for wait in self.waiting:
            wait()
        self.waiting.clear()
        distributed.barrier()
        if distributed.get_rank() == 0:
            for old in (self.folder / DCP).glob("*"):
                shutil.rmtree(old)
        distributed.barrier()

    def save_ours(self, in_background: bool, wait: bool) -> None:
        self.count += 1
        saver = self.savers[in_background]
        saver.start(Facts(self.count, self.config, {"tp": 1}, {}, {}))

        def end() -> None:
            outcome = saver.take(wait=True)
            assert outcome is not None and not outcome.problem, outcome

        end() if wait else self.waiting.append(end)

    def save_theirs(self, wait: bool) -> None:
        end = self.theirs.start_save(str(self.next_folder()))
        end() if wait else self.waiting.append(end)

    def copy(self) -> None:
        """What a save in the background has to do at the least."""
        for part, target in zip(self.savers[True].parts, self.savers[True].staged, strict=True):
            target.copy_(part.tensor)


def calls_of(case: Case, sides: Sides) -> Mapping[str, Callable[[], object]]:
    """The sides of a case."""
    if case.name == "save":
        return {
            OURS: lambda: sides.save_ours(False, True),
            DCP: lambda: sides.theirs.save(str(sides.next_folder())),
        }
    if case.name == "load":
        sides.save_ours(False, True)
        ours = sides.folder / OURS / folder_of(sides.count)
        theirs = str(sides.folder / "torch")
        sides.theirs.save(theirs)
        return {
            OURS: lambda: sides.state.load(Checkpoint.of(LocalStore(ours))),
            DCP: partial(sides.theirs.load, theirs),
        }
    wait = case.name == "background"
    calls = {OURS: lambda: sides.save_ours(True, wait), DCP: lambda: sides.save_theirs(wait)}
    return calls if wait else calls | {COPY: sides.copy}


def measure(info: RankInfo, case_name: str, config: RunConfig, rounds: int, folder: str, result: str) -> None:
    """One rank's part of a case; rank 0 writes the seconds of every side and round to the JSON file ``result``."""
    case = case_named(case_name, CASES)

    def sides() -> dict[str, list[float]]:
        with_state = Sides(info, lay_out(config, case), Path(folder))
        calls = calls_of(case, with_state)
        seconds = alternate(calls, rounds, warmup=2, before=with_state.settle)
        with_state.settle()
        total = torch.tensor(with_state.num_bytes)
        distributed.all_reduce(total)
        return seconds | {BYTES: [float(total)]}

    time_on_all(info, 1, sides, result)


def lay_out(config: RunConfig, case: Case) -> RunConfig:
    """The resolved run of a case."""
    return resolve(replace(config, parallel=ParallelConfig(dp=case.num_ranks, zero=3)), case.num_ranks)


def collect(case: Case, config: RunConfig, result: Path) -> Comparison:
    """The comparison whose timings ``measure`` wrote."""
    seconds = json.loads(result.read_text())
    num_bytes = seconds.pop(BYTES)[0]
    rates = {f"GB/s {side}": float(f"{num_bytes / median(times) / 1e9:.3g}") for side, times in seconds.items()}
    return comparison(case.name, OURS, seconds, {"ranks": case.num_ranks, "MB": round(num_bytes / 1e6), **rates})
