"""The schedule of a run: every kind can be planned, and a list of one's own is refused with the key that mends it."""

from dataclasses import replace
from pathlib import Path

import pytest

from megacore.config.load import all_keys, load
from megacore.config.pipeline import num_chunks
from megacore.config.resolve import resolve
from megacore.config.schema import ParallelConfig, RunConfig
from megacore.config.validate import check
from megacore.schedule.generators.generate import KINDS, default_chunks, generate
from megacore.schedule.lower import lower
from megacore.schedule.schedule import Schedule
from megacore.schedule.text import to_text
from megacore.train.schedule import num_microbatches, plan_schedule

CHOICES = all_keys()["parallel.schedule"].metadata["choices"]
MICROBATCHES = 3


def run_of(*overrides: str, ranks: int = 2, tied: bool = False) -> RunConfig:
    """A resolved run of one replica with pp=ranks and 3 microbatches of 2 samples."""
    words = (f"parallel.pp={ranks}", "train.micro_batch_size=2", f"train.global_batch_size={2 * MICROBATCHES}")
    config = load(None, [*words, f"model.tie_embeddings={str(tied).lower()}", *overrides], "demo")
    check(config, ranks)
    return resolve(config, ranks)


def written(path: Path, schedule: Schedule) -> str:
    (path / "mine.txt").write_text(to_text(schedule), encoding="utf-8")
    return f"parallel.schedule={path / 'mine.txt'}"


def test_the_run_file_and_the_generators_know_the_same_kinds() -> None:
    assert set(CHOICES) == set(KINDS) - {"forward"}
    for kind in CHOICES:
        assert num_chunks(ParallelConfig(schedule=kind)) == default_chunks(kind)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("chunks", [0, 2])
@pytest.mark.parametrize("kind", CHOICES)
def test_every_legal_run_has_a_schedule(kind: str, chunks: int, ranks: int) -> None:
    config = run_of(
        f"parallel.schedule={kind}", f"parallel.chunks={chunks}", "model.num_layers=6", ranks=ranks, tied=True
    )
    schedule = plan_schedule(config, num_microbatches(config))
    assert schedule.num_stages == ranks * config.parallel.chunks
    assert schedule.num_microbatches == MICROBATCHES
    assert all(str(rank).endswith(" O") for rank in schedule.ranks)
    assert any("T0~" in str(rank) for rank in schedule.ranks) == (schedule.home[0] != schedule.home[-1])


@pytest.mark.parametrize("lowered", [False, True])
def test_a_list_of_ones_own_is_what_is_run(tmp_path: Path, lowered: bool) -> None:
    schedule = generate("zb-v", 2, MICROBATCHES)
    word = written(tmp_path, lower(schedule) if lowered else schedule)
    config = run_of(word, "parallel.chunks=2")
    assert plan_schedule(config, MICROBATCHES).ranks == lower(schedule).ranks


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (generate("1f1b", 3, MICROBATCHES), "has lists for 3 ranks, but parallel.pp=2; set pp=3"),
        (generate("interleaved", 2, MICROBATCHES, 2), "forwards 2, 2 stages .* but parallel.chunks=1; set chunks=2"),
        (generate("1f1b", 2, 5), r"is for 5 microbatches.*makes 3; set global_batch_size=10"),
        (generate("forward", 2, MICROBATCHES), "only forwards"),
    ],
)
def test_a_list_for_another_run_is_refused(tmp_path: Path, schedule: Schedule, message: str) -> None:
    config = run_of(written(tmp_path, schedule))
    with pytest.raises(ValueError, match=f"mine.txt {message}"):
        plan_schedule(config, MICROBATCHES)


def test_ranks_with_different_numbers_of_stages_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("0: F0.0 F1.0 B1.0 B0.0\n1: F2.0 B2.0", encoding="utf-8")
    config = run_of(f"parallel.schedule={tmp_path / 'mine.txt'}")
    with pytest.raises(ValueError, match="forwards 2, 1 stages on its ranks.*give every rank the same number"):
        plan_schedule(config, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0: F0.0 F0.1 F0.2 B0.0 B0.1\n1: F1.0 B1.0 F1.1 B1.1 F1.2 B1.2", "mine.txt: rank 0, .*B0.2"),
        ("0: F0.0 Q0.0", "mine.txt: line 1: 'Q0.0' is not an instruction"),
        ("F0.0 B0.0", "mine.txt: line 1"),
    ],
)
def test_a_wrong_list_is_refused_under_its_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        plan_schedule(run_of(f"parallel.schedule={tmp_path / 'mine.txt'}"), MICROBATCHES)


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(content or b"")
    config = run_of(f"parallel.schedule={path}")
    if content is None:
        path.unlink()
    with pytest.raises(ValueError, match=f"parallel.schedule={path}"):
        plan_schedule(config, MICROBATCHES)


@pytest.mark.parametrize("tied", [False, True])
def test_messages_of_ones_own_must_know_of_tied_weights(tmp_path: Path, tied: bool) -> None:
    drawn = generate("1f1b", 2, MICROBATCHES)
    config = run_of(written(tmp_path, lower(drawn, tied=not tied)), tied=tied)
    message = "lacks sums .*; add T0~1 on rank 0 and T1~0 on rank 1" if tied else "has sums .*; leave out T0~1"
    with pytest.raises(ValueError, match=message):
        plan_schedule(config, MICROBATCHES)
    plan_schedule(replace(config, model=replace(config.model, tie_embeddings=not tied)), MICROBATCHES)
