"""A save that is killed, or fails, at any of its operations: the newest whole checkpoint is the old one or the new."""

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megacore.checkpoint.find import ASIDE, LATEST, folder_of, newest
from megacore.checkpoint.read import Checkpoint
from megacore.checkpoint.retain import Retention
from megacore.checkpoint.save import Outcome
from megacore.checkpoint.store import LocalStore, open_store
from tests.checkpoint.common import config_of, digests, facts_of, save, saver_of, steps
from tests.engine.common import built_rank
from tests.pool import WorkerPool

TINY = ("model.vocab_size=67", "model.num_layers=1", "optim.name=lion")
"""Few slices, so few operations."""
ALONE = config_of(TINY, {"dp": 1})
TWO = config_of(TINY, {"dp": 2, "zero": 1})
KILLED = 7


class At:
    """A notice that acts at one operation, counted from 0, and keeps all of them."""

    def __init__(self, place: int, act: Callable[[], None]) -> None:
        self.place, self.act = place, act
        self.seen: list[str] = []

    def __call__(self, operation: str) -> None:
        self.seen.append(operation)
        if len(self.seen) - 1 == self.place:
            self.act()


def leave() -> None:
    os._exit(KILLED)  # like SIGKILL: nothing is tidied up


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def odd_fault() -> None:
    raise KeyError("odd")


def whole_step(folder: Path) -> int:
    """That of the newest whole checkpoint, every byte of which is looked at."""
    checkpoint = Checkpoint.of(newest(open_store(str(folder))))
    checkpoint.verify()
    return checkpoint.manifest.step


def kills_of_rank(rank: int, base: str, in_background: bool, first_step: int) -> list[tuple[int, list[str]]]:
    """Saves the step after ``first_step`` in copies of ``base``, killed at one operation after the other until one is
    done; then the next save. (newest whole step after the kill, the folders after the next save) of each."""
    built = built_rank(0, 1, ALONE)
    steps(built, 1, 1)
    found: list[tuple[int, list[str]]] = []
    while True:
        folder = Path(base).with_name(f"copy-{len(found)}")
        shutil.copytree(base, folder)
        child = os.fork()
        if child == 0:
            try:
                notice = At(len(found), leave)
                save(built, saver_of(built, str(folder), in_background, Retention(1), notice), first_step + 1)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        after = whole_step(folder) if first_step or os.WEXITSTATUS(status) == 0 else newest_or_0(folder)
        outcome = save(built, saver_of(built, str(folder), in_background, Retention(1)), first_step + 2)
        assert outcome.problem == outcome.remark == "", outcome
        assert whole_step(folder) == first_step + 2
        found.append((after, open_store(str(folder)).folders()))
        shutil.rmtree(folder)
        if os.WEXITSTATUS(status) == 0:
            return found
        assert os.WEXITSTATUS(status) == KILLED


def newest_or_0(folder: Path) -> int:
    try:
        return whole_step(folder)
    except ValueError as reason:
        assert "holds no whole checkpoint" in str(reason)
        return 0


def write_one(rank: int, folder: str, step: int) -> list[str]:
    """One save; its operations."""
    built = built_rank(0, 1, ALONE)
    notice = At(-1, leave)
    assert save(built, saver_of(built, folder, notice=notice), step).problem == ""
    return notice.seen


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "beside"])
@pytest.mark.parametrize("first_step", [0, 1], ids=["first save", "second save"])
def test_killed_at_every_operation(pool: WorkerPool, tmp_path: Path, in_background: bool, first_step: int) -> None:
    base = tmp_path / "base"
    base.mkdir()
    if first_step:
        pool.run(write_one, 1, str(base), first_step)
    ((found),) = pool.run(kills_of_rank, 1, str(base), in_background, first_step, timeout_s=120)
    newest_after = [step for step, _ in found]
    assert set(newest_after) == {first_step, first_step + 1}
    assert newest_after == sorted(newest_after), "once it is there, it stays"
    assert len(found) > 25, "a save has more operations than that"
    assert {tuple(folders) for _, folders in found} == {(folder_of(first_step + 2),)}, "nothing else is left behind"


def test_a_save_is_synced_before_it_is_named(pool: WorkerPool, tmp_path: Path) -> None:
    (seen,) = pool.run(write_one, 1, str(tmp_path), 3)
    manifest, folder = seen.index("rename manifest.json"), folder_of(3)
    for name in ("rank-00000.safetensors", "attachment-0", ".manifest.json.part"):
        synced = seen.index(f"fsync {name}")
        assert synced < manifest and f"write {name}" not in seen[synced:]
    assert f"fsync {folder}/" in seen[:manifest] and f"fsync {folder}/" in seen[manifest:]
    assert seen.index(f"rename {LATEST}") > manifest


def fails_of_rank(rank: int, folder: str, in_background: bool, odd: bool) -> list[Outcome]:
    """Faults at each operation of a save after another; every time the next save must go well."""
    built = built_rank(0, 1, ALONE)
    outcomes: list[Outcome] = []
    notice = At(-1, leave)
    saver = saver_of(built, folder, in_background, Retention(1), notice)
    assert save(built, saver, 1).problem == ""
    expected = digests(folder, 1)
    for place in range(200):
        notice.seen, notice.place, notice.act = [], place, odd_fault if odd else fill_disk
        outcome = save(built, saver, 2 * place + 2)
        assert digests(folder, whole_step(Path(folder))) == expected
        if len(notice.seen) <= place:
            return outcomes
        outcomes.append(outcome)
        notice.place = -1
        assert save(built, saver, 2 * place + 3).problem == ""
        assert open_store(folder).folders() == [folder_of(2 * place + 3)]
    raise AssertionError("a save does not end")


@pytest.mark.parametrize("odd", [False, True], ids=["disk full", "odd fault"])
@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "beside"])
def test_failing_at_every_operation(pool: WorkerPool, tmp_path: Path, in_background: bool, odd: bool) -> None:
    (outcomes,) = pool.run(fails_of_rank, 1, str(tmp_path), in_background, odd, timeout_s=120)
    failed = [outcome for outcome in outcomes if outcome.problem]
    assert len(failed) > 20 and outcomes[: len(failed)] == failed
    cause = "KeyError: 'odd'" if odd else "No space left on device"
    for outcome in outcomes:
        assert cause in outcome.problem + outcome.remark
        assert not (outcome.problem and outcome.remark)
    assert any(outcome.remark for outcome in outcomes), "the checkpoint is there when old ones are removed"


def one_fails_of_rank(rank: int, folder: str, guilty: int, point: str) -> list[Outcome]:
    built = built_rank(rank, 2, TWO)

    def notice(operation: str) -> None:
        if rank == guilty and len(outcomes) == 1 and operation.startswith(point):
            odd_fault()

    outcomes: list[Outcome] = []
    saver = saver_of(built, folder, True, Retention(1), notice)
    for step in (1, 2, 3):  # the second fails
        steps(built, step, step)  # training's collectives have nothing to do with it
        saver.start(facts_of(built, step))
        steps(built, step, step)
        outcome = saver.take(wait=True)
        assert outcome is not None
        outcomes.append(outcome)
    return outcomes


@pytest.mark.parametrize(
    ("guilty", "point"), [(0, "write"), (1, "write"), (1, "fsync"), (0, "rename"), (0, "remove"), (0, "fsync step")]
)
def test_a_fault_of_one_rank_is_heard_on_all(pool: WorkerPool, tmp_path: Path, guilty: int, point: str) -> None:
    mine, others = pool.run(one_fails_of_rank, 2, str(tmp_path), guilty, point)
    told = [[(outcome.step, outcome.problem, outcome.remark) for outcome in each] for each in (mine, others)]
    assert told[0] == told[1]
    problems = [problem or remark for _, problem, remark in told[0]]
    assert problems[0] == problems[2] == "" and "KeyError: 'odd'" in problems[1]
    assert whole_step(tmp_path) == 3


def mutating_of_rank(rank: int, folder: str) -> None:
    built = built_rank(rank, 2, TWO)
    steps(built, 1, 2)
    before = saver_of(built, f"{folder}/before")
    assert save(built, before, 2).problem == ""
    gate = threading.Event()
    saver = saver_of(built, f"{folder}/beside", True, notice=lambda operation: gate.wait(30) and None)
    saver.start(facts_of(built, 2))
    assert saver.take() is None, "it goes on"
    with pytest.raises(AssertionError, match="not taken"):
        saver.start(facts_of(built, 3))
    steps(built, 3, 4)
    for part in saver.parts:
        part.tensor.zero_()
    gate.set()
    outcome = saver.take(wait=True)
    assert outcome is not None and outcome.problem == ""


def test_state_may_change_while_it_is_written(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(mutating_of_rank, 2, str(tmp_path))
    assert digests(str(tmp_path / "beside"), 2) == digests(str(tmp_path / "before"), 2)


def test_a_full_disk_is_noticed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = built_rank(0, 1, ALONE)
    notice = At(-1, leave)
    saver = saver_of(built, str(tmp_path), notice=notice)
    monkeypatch.setattr(LocalStore, "free_bytes", lambda store: saver.num_bytes + (1 << 20))
    outcome = save(built, saver, 1)
    assert f"a checkpoint takes {saver.num_bytes}; free some" in outcome.problem
    assert notice.seen == [] and open_store(str(tmp_path)).folders() == []
    with pytest.raises(ValueError, match="free some; or name another place with checkpoint.folder"):
        saver.preflight()


def test_what_is_saved_twice_is_replaced(tmp_path: Path) -> None:
    built = built_rank(0, 1, ALONE)
    saver = saver_of(built, str(tmp_path))
    for number in range(2):
        with torch.no_grad():
            saver.parts[0].tensor.fill_(number)
        assert save(built, saver, 4).problem == ""
        assert whole_step(tmp_path) == 4
    part = saver.parts[0]
    found = Checkpoint.of(newest(open_store(str(tmp_path)))).read_key(part.key, part.start, part.size)
    assert (found == 1).all()


def test_links_are_not_followed(tmp_path: Path) -> None:
    """What a save removes or overwrites lies in its own folder."""
    elsewhere = tmp_path / "elsewhere"
    built = built_rank(0, 1, ALONE)
    assert save(built, saver_of(built, str(elsewhere)), 1).problem == ""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / folder_of(1)).symlink_to(elsewhere / folder_of(1))
    (folder / f".{LATEST}.part").symlink_to(precious)
    outcome = save(built, saver_of(built, str(folder), retention=Retention(1)), 2)
    assert outcome.problem == "" and "latest" in outcome.remark
    assert precious.read_text() == "precious"
    (folder / f".{LATEST}.part").unlink()
    assert save(built, saver_of(built, str(folder), retention=Retention(1)), 3).remark == ""
    assert open_store(str(folder)).folders() == [folder_of(3)]
    assert whole_step(elsewhere) == 1
    assert ASIDE not in os.listdir(folder)
