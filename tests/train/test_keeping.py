"""All ranks take up the same checkpoint or none, whatever one of them finds; saves wait for each other."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megacore.checkpoint.find import ASIDE, folder_of
from megacore.checkpoint.save import Outcome
from megacore.checkpoint.store import LocalStore
from megacore.config.schema import RunConfig
from megacore.mesh.collectives import PeerFailed
from megacore.train.failpoints import Failpoints
from megacore.train.keeping import Keeper
from megacore.train.state import State
from tests.checkpoint.common import config_of, digests, save, saver_of, steps
from tests.engine.common import built_rank
from tests.pool import WorkerPool

Told = list[str]


def config_in(folder: Path, *words: str) -> RunConfig:
    tiny = ("model.vocab_size=67", "model.num_layers=1", "checkpoint.save_every=1", f"out={folder}")
    return config_of((*tiny, *words), {"dp": 2, "zero": 1})


def write_two(rank: int, config: RunConfig) -> None:
    """Checkpoints of steps 1 and 2, which say as little of the data as these runs know."""
    built = built_rank(rank, 2, config)
    saver = saver_of(built, f"{config.out}/checkpoints")
    for step in (1, 2):
        steps(built, step, step)
        assert save(built, saver, step).problem == ""


def resume_of_rank(rank: int, config: RunConfig, guilty: int, what: str) -> tuple[int, Told]:
    """The step that is taken up while one rank finds something wrong: (step, what was passed over)."""
    built = built_rank(rank, 2, config)
    keeper = Keeper(built, Failpoints(), State(built))
    if rank == guilty:
        spoil(keeper, what)
    try:
        resumed = keeper.resume()
        keeper.prepare({})
    except (ValueError, PeerFailed) as error:
        return -1, [f"{type(error).__name__}: {error}"]
    assert resumed is not None
    return resumed.step, list(resumed.rejected)


def spoil(keeper: Keeper, what: str) -> None:
    """Let one of a keeper's steps fail, the first time alone."""
    faults = iter([OSError("this disk is odd")])

    def failing(work: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any) -> Any:
            for fault in faults:
                raise fault
            return work(*args)

        return instead

    if what == "loads":
        keeper.state.load = failing(keeper.state.load)  # type: ignore[method-assign]
    elif what == "looks":
        keeper.store.names = failing(keeper.store.names)  # type: ignore[method-assign]
    else:
        keeper.store.move_folder = failing(keeper.store.move_folder)  # type: ignore[method-assign]


@pytest.fixture
def out(pool: WorkerPool, tmp_path: Path) -> Path:
    pool.run(write_two, 2, config_in(tmp_path))
    return tmp_path


@pytest.mark.parametrize("guilty", [0, 1])
def test_what_one_rank_cannot_load_none_takes(pool: WorkerPool, out: Path, guilty: int) -> None:
    found = pool.run(resume_of_rank, 2, config_in(out), guilty, "loads")
    assert found == [(1, ["this disk is odd"])] * 2
    assert (out / "checkpoints" / ASIDE / f"{folder_of(2)}-1").exists()


@pytest.mark.parametrize(("what", "words"), [("looks", ()), ("moves", ("checkpoint.resume=never",))])
def test_what_rank_0_cannot_do_all_hear_of(pool: WorkerPool, out: Path, what: str, words: tuple[str, ...]) -> None:
    (step, (own,)), (other_step, (theirs,)) = pool.run(resume_of_rank, 2, config_in(out, *words), 0, what)
    assert step == other_step == -1
    assert own.startswith("ValueError: ") and "this disk is odd; make it" in own
    assert theirs.startswith("PeerFailed: rank 0 failed: ValueError")


@dataclass
class Listener:
    """In a reporter's place."""

    tokens: int = 0
    skipped: int = 0
    heard: list[Outcome] = field(default_factory=list)

    def saved(self, outcome: Outcome) -> None:
        self.heard.append(outcome)

    def exported(self, result: object) -> None:
        pass


def busy_of_rank(rank: int, config: RunConfig) -> tuple[list[int], list[int], float]:
    """Three saves in a row to a slow disk: (steps heard of before each, and in the end; seconds)."""
    built = built_rank(rank, 2, config)
    keeper, listener = Keeper(built, Failpoints(), State(built)), Listener()

    def slow(operation: str) -> None:
        if operation.startswith("fsync rank"):
            time.sleep(0.2)

    keeper.store = LocalStore(Path(config.out) / "checkpoints", slow)
    keeper.prepare({})
    assert keeper.saver is not None
    plan = SimpleNamespace(num_samples=lambda step: 8 * step)
    data: Any = SimpleNamespace(plan=plan, identity="x", tokenizer=None)
    began, before = time.perf_counter(), []
    for step in (1, 2, 3):
        steps(built, step, step)
        keeper.save(step, data, listener, None)  # type: ignore[arg-type]
        before.append(len(listener.heard))
    keeper.finish(listener)  # type: ignore[arg-type]
    assert all(outcome.problem == "" for outcome in listener.heard), listener.heard
    return before, [outcome.step for outcome in listener.heard], time.perf_counter() - began


def test_a_save_waits_for_the_one_before(pool: WorkerPool, tmp_path: Path) -> None:
    for before, heard, seconds in pool.run(busy_of_rank, 2, config_in(tmp_path)):
        assert before == [0, 1, 2] and heard == [1, 2, 3]
        assert seconds > 0.6
    whole: list[dict[str, str]] = [digests(str(tmp_path / "checkpoints"), step) for step in (1, 2, 3)]
    assert whole[0] != whole[1] != whole[2]
