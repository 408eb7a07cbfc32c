"""Which checkpoints stay, and how folders are found and named."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacore.checkpoint.find import folder_of, newest, step_of, steps_in
from megacore.checkpoint.manifest import MANIFEST
from megacore.checkpoint.retain import Retention, prune, remove_unfinished
from megacore.checkpoint.store import open_store
from megacore.checkpoint.write import commit
from tests.checkpoint.common import config_of

CONFIG = config_of((), {"dp": 1})
LOSSES: dict[int, float | None] = {10: 3.0, 20: 1.0, 30: None, 40: 2.0, 50: 2.5, 60: 2.6}


@pytest.mark.parametrize(
    ("retention", "expected"),
    [
        (Retention(0), {10, 20, 30, 40, 50, 60}),
        (Retention(1), {60}),
        (Retention(2), {50, 60}),
        (Retention(9), {10, 20, 30, 40, 50, 60}),
        (Retention(1, keep_every=30), {30, 60}),
        (Retention(1, keep_best=1), {20, 60}),
        (Retention(1, keep_best=3), {20, 40, 50, 60}),
        (Retention(1, keep_every=20, keep_best=1), {20, 40, 60}),
        (Retention(1, held=frozenset({10})), {10, 60}),
    ],
    ids=str,
)
def test_who_stays(retention: Retention, expected: set[int]) -> None:
    assert retention.kept(LOSSES) == expected


@given(
    st.dictionaries(st.integers(1, 99), st.none() | st.floats(0, 9), min_size=1),
    st.integers(1, 5),
    st.integers(0, 9),
    st.integers(0, 3),
)
def test_the_newest_and_the_best_always_stay(losses: dict[int, float | None], keep: int, every: int, best: int) -> None:
    stay = Retention(keep, every, best).kept(losses)
    assert max(losses) in stay and len(stay) >= min(keep, len(losses))
    known = [loss for loss in losses.values() if loss is not None]
    if best and known:
        assert min(known) in {losses[step] for step in stay}


def make(folder: Path, step: int, loss: float | None = None) -> None:
    state = {"samples": 8 * step} | ({} if loss is None else {"val_loss": loss})
    store = open_store(str(folder)).child(folder_of(step))
    commit(store, [], kind="training", step=step, config=CONFIG, layout={}, state=state, attachments={})


def test_prune_reads_losses_from_manifests(tmp_path: Path) -> None:
    for step, loss in LOSSES.items():
        make(tmp_path, step, loss)
    store = open_store(str(tmp_path))
    removed = prune(store, Retention(1, keep_best=2))
    assert store.folders() == [folder_of(step) for step in (20, 40, 60)]
    assert sorted(removed) == [str(tmp_path / folder_of(step)) for step in (10, 30, 50)]
    assert prune(store, Retention(1, keep_best=2)) == ()


def test_a_damaged_checkpoint_is_no_best_one(tmp_path: Path) -> None:
    for step, loss in LOSSES.items():
        make(tmp_path, step, loss)
    manifest = tmp_path / folder_of(20) / MANIFEST
    manifest.write_bytes(manifest.read_bytes()[:-1])
    prune(open_store(str(tmp_path)), Retention(1, keep_best=1))
    assert open_store(str(tmp_path)).folders() == [folder_of(40), folder_of(60)]


def test_what_is_not_finished_goes_and_the_rest_stays(tmp_path: Path) -> None:
    make(tmp_path, 10)
    for name in (folder_of(20), "aside", "mine", "step-7", "step-٣"):
        (tmp_path / name).mkdir()
    remove_unfinished(open_store(str(tmp_path)))
    assert set(open_store(str(tmp_path)).folders()) == {folder_of(10), "aside", "mine", "step-7", "step-٣"}


def test_names_of_folders() -> None:
    assert folder_of(123) == "step-00000123" and step_of("step-00000123") == 123
    assert step_of(folder_of(10**9)) == 10**9
    for name in ("step-123", "step-", "step-0000012x", "step--0000123", "step-00000１23", "run", "step-00000123-1"):
        assert step_of(name) is None, name


def test_newest_first(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        make(tmp_path, step)
    (tmp_path / folder_of(200)).mkdir()
    store = open_store(str(tmp_path))
    assert [(step, done) for step, _, done in steps_in(store)] == [(200, False), (100, True), (10, True), (9, True)]
    assert newest(store).describe() == str(tmp_path / folder_of(100))
    assert json.loads(newest(store).read(MANIFEST))["step"] == 100
