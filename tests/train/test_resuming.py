"""Runs that go on, from the command line: what is written down is what an uninterrupted run would have written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megacore.checkpoint.find import ASIDE, LATEST, folder_of
from megacore.checkpoint.manifest import MANIFEST, hash_of
from megacore.checkpoint.read import Checkpoint
from megacore.data.sampler import Batch, BatchPlan
from megacore.launch.train import main
from megacore.model.inputs import Inputs
from megacore.monitor.run_folder import METRICS
from megacore.train.feed import Feed
from tests.train.runs import (
    FEATURES,
    LAYOUTS,
    STEPS,
    events,
    figures,
    files_in,
    interrupted,
    last_state,
    told,
    words_of,
    write_corpus,
)


@pytest.mark.parametrize("name", FEATURES)
def test_the_same_command_goes_on(
    name: str, letters: str, uninterrupted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = words_of(letters, tmp_path, *FEATURES[name])
    interrupted(monkeypatch, 4, words)
    interrupted(monkeypatch, 6, words)
    assert main(words) == 0
    assert figures(tmp_path) == figures(uninterrupted[name])
    assert last_state(tmp_path) == last_state(uninterrupted[name])
    assert [event["step"] for event in events(tmp_path, "resume")] == [2, 4]
    assert [event["changes"] for event in events(tmp_path, "resume")] == [[], []]
    assert not (tmp_path / "previous").exists()


def test_a_start_that_dies_at_once_hides_nothing(letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was trained beyond the checkpoint is told of by the next start, though one died before it could tell."""
    words = words_of(letters, tmp_path)
    interrupted(monkeypatch, 6, words)
    with monkeypatch.context() as patch:
        patch.setattr("megacore.train.reporter.overview", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([*words, f"checkpoint.resume={tmp_path / 'checkpoints' / folder_of(2)}"])
    assert main([*words, f"checkpoint.resume={tmp_path / 'checkpoints' / folder_of(2)}"]) == 0
    (resume,) = events(tmp_path, "resume")
    assert (resume["step"], resume["again_until_step"], resume["again_until_sample"]) == (2, 4, 32)
    assert [each["step"] for each in figures(tmp_path)] == list(range(1, STEPS + 1))


def test_a_finished_run_does_nothing_more(
    letters: str, uninterrupted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(uninterrupted["plain"], tmp_path / "run")
    before = last_state(tmp_path / "run")
    for more in ((), ("train.steps=5",)):
        capsys.readouterr()
        assert main(words_of(letters, tmp_path / "run", *more)) == 0
        assert "nothing is left to do" in capsys.readouterr().out
        assert figures(tmp_path / "run") == figures(uninterrupted["plain"])
        assert last_state(tmp_path / "run") == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_goes_on(
    layout: str, letters: str, uninterrupted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(monkeypatch, 4, words_of(letters, tmp_path))
    assert main(words_of(letters, tmp_path, *LAYOUTS[layout], "--nproc", "2")) == 0
    (resume,) = events(tmp_path, "resume")
    assert resume["step"] == 2 and resume["samples"] == 16
    assert resume["changes"] and all(change.endswith("(safe)") for change in resume["changes"])
    for ours, expected in zip(figures(tmp_path), figures(uninterrupted["plain"]), strict=True):
        assert ours == pytest.approx(expected, rel=1e-9, abs=0)


def test_other_batches_and_rates_go_on_at_the_next_sample(
    letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ordinals: list[list[int]] = []
    step_of_feed = Feed.step

    def watched(feed: Feed, step: int) -> list[Inputs]:
        microbatches = step_of_feed(feed, step)
        ordinals.append([int(ordinal) for inputs in microbatches for ordinal in inputs.ordinal_b])
        return microbatches

    interrupted(monkeypatch, 4, words_of(letters, tmp_path))
    monkeypatch.setattr(Feed, "step", watched)
    capsys.readouterr()
    assert main(words_of(letters, tmp_path, "train.global_batch_size=4", "optim.lr=0.02")) == 0
    assert list(map(len, ordinals)) == [4, 4, 4, 4]
    assert [ordinal for batch in ordinals for ordinal in batch] == list(range(16, 32)), "none lost, none met twice"
    (resume,) = events(tmp_path, "resume")
    assert (resume["step"], resume["samples"]) == (2, 16)
    said = capsys.readouterr().out
    for change in ("train.global_batch_size: 8 -> 4", "optim.lr: 0.01 -> 0.02"):
        assert f"{change} (changes the maths)" in resume["changes"] and f"{change} (changes the maths)" in said
    assert [record["tokens"] // 16 for record in figures(tmp_path)] == [8, 16, 20, 24, 28, 32]
    assert BatchPlan(4, 2, (), (3, 16)).batch(3) == Batch(16, 4)
    state = Checkpoint.open(str(tmp_path)).manifest.state
    assert state["samples"] == 32


def test_a_run_is_made_longer(letters: str, tmp_path: Path) -> None:
    """Past the end of an epoch, too: the order of samples does not depend on how many there will be."""
    more = ("optim.lr_schedule=constant", "train.global_batch_size=64", "train.eval_every=0")
    assert main(words_of(letters, tmp_path / "run", *more, "train.steps=4")) == 0
    assert main(words_of(letters, tmp_path / "run", *more, "train.steps=8")) == 0
    assert main(words_of(letters, tmp_path / "whole", *more, "train.steps=8")) == 0
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
    assert last_state(tmp_path / "run", 8) == last_state(tmp_path / "whole", 8)
    assert "train.steps: 4 -> 8 (safe)" in events(tmp_path / "run", "resume")[0]["changes"]


def test_the_best_checkpoint_stays(letters: str, tmp_path: Path) -> None:
    """Also where a text was sampled after the evaluation."""
    sampled = ("log.sample_every=2", 'log.sample_prompts=["ab"]', "log.sample_tokens=2")
    assert main(words_of(letters, tmp_path, *sampled, "checkpoint.keep=1", "checkpoint.keep_best=1")) == 0
    losses = {record["step"]: record["val_loss"] for record in figures(tmp_path) if "val_loss" in record}
    best = min(losses, key=lambda step: losses[step])
    folders = {each.name for each in (tmp_path / "checkpoints").glob("step-*")}
    assert folders == {folder_of(best), folder_of(STEPS)}
    assert Checkpoint.open(str(tmp_path)).manifest.state["val_loss"] == losses[STEPS]


def test_state_that_was_not_kept_begins_anew(letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, 4, words_of(letters, tmp_path))
    assert main(words_of(letters, tmp_path, "optim.clip=adagc", "optim.adagc_warmup_steps=1")) == 0
    assert "optim.clip: norm -> adagc (changes the maths)" in events(tmp_path, "resume")[0]["changes"]
    checkpoint = Checkpoint.open(str(tmp_path))
    assert checkpoint.read_key("state/clip/clock", (), ()).item() == 4


def test_moments_that_were_not_kept_are_asked_for(
    letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(letters, tmp_path, "optim.name=sgd", "optim.momentum=0")
    interrupted(monkeypatch, 4, words)
    error = told(capsys, [*words, "optim.momentum=0.9"])
    assert "has no velocity, which the optimizer keeps with these settings; set them back" in error
    assert "Traceback" not in error


def test_what_cannot_change_is_refused_at_once(
    letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(monkeypatch, 4, words_of(letters, tmp_path))
    before = files_in(tmp_path)
    other = ("model.num_layers=3", "train.seed=5", "optim.name=lion", "data.split=7,3,0", "data.temperature=2")
    error = told(capsys, words_of(letters, tmp_path, *other))
    for key in other:
        assert key.partition("=")[0] in error
    assert error.count("was saved with") == len(other)
    assert files_in(tmp_path) == before, "a refused run changes nothing"


def test_other_data_of_the_same_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_corpus(str(tmp_path / "letters"), 1)
    interrupted(monkeypatch, 4, words_of(data, tmp_path / "run"))
    assert main(words_of(data, tmp_path / "run")) == 0
    write_corpus(data, 2)
    before = files_in(tmp_path / "run")
    back = f"checkpoint.resume={tmp_path / 'run' / 'checkpoints' / folder_of(2)}"
    for more in ((), (back,)):
        assert "are not those that the checkpoint" in told(capsys, words_of(data, tmp_path / "run", *more))
        assert files_in(tmp_path / "run") == before, "a refused run changes nothing"


def test_data_may_move(
    uninterrupted: dict[str, Path], letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(monkeypatch, 4, words_of(letters, tmp_path / "run"))
    for suffix in (".bin", ".idx", ".meta.json"):
        if Path(letters + suffix).exists():
            shutil.copy(letters + suffix, tmp_path / f"moved{suffix}")
    assert main(words_of(str(tmp_path / "moved"), tmp_path / "run")) == 0
    assert figures(tmp_path / "run") == figures(uninterrupted["plain"])
    (change,) = events(tmp_path / "run", "resume")[0]["changes"]
    assert change.startswith("data.blend") and change.endswith("(safe)")


def test_a_run_goes_back(letters: str, uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    """To an earlier checkpoint of its own: what was newer stays, beside."""
    out = tmp_path / "run"
    shutil.copytree(uninterrupted["plain"], out)
    assert main(words_of(letters, out, f"checkpoint.resume={out / 'checkpoints' / folder_of(2)}")) == 0
    assert figures(out) == figures(uninterrupted["plain"])
    assert last_state(out) == last_state(uninterrupted["plain"])
    aside = out / "checkpoints" / ASIDE
    assert sorted(each.name for each in aside.iterdir()) == [f"{folder_of(4)}-1", f"{folder_of(6)}-1"]
    assert not (out / "previous").exists()
    assert Checkpoint.open(str(out)).manifest.step == 6


def test_another_run_is_gone_on_from(letters: str, uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    """In a folder where an older run was: its files and checkpoints are put aside, and none of them is taken for this
    one's."""
    out = tmp_path / "run"
    assert main(words_of(letters, out, "train.steps=8", "train.seed=9")) == 0
    source = uninterrupted["plain"] / "checkpoints" / folder_of(4)
    words = words_of(letters, out, f"checkpoint.resume={source}", "train.steps=6")
    assert main(words) == 0
    assert [record["step"] for record in figures(out)] == [5, 6]
    assert figures(out) == figures(uninterrupted["plain"])[4:]
    assert last_state(out) == last_state(uninterrupted["plain"])
    assert (out / "previous" / "1" / METRICS).exists()
    assert sorted(each.name for each in (out / "checkpoints").glob("step-*")) == [folder_of(6)]
    assert (out / "checkpoints" / LATEST).read_text() == f"{folder_of(6)}\n"
    whole_run = words_of(letters, tmp_path / "other", f"checkpoint.resume={uninterrupted['plain']}", "train.steps=7")
    assert main(whole_run) == 0
    assert [record["step"] for record in figures(tmp_path / "other")] == [7]


def test_never_begins_anew(
    letters: str, uninterrupted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(uninterrupted["plain"], out)
    words = words_of(letters, out, "checkpoint.resume=never")
    interrupted(monkeypatch, 2, words)  # before anything was saved
    assert not (out / "checkpoints" / LATEST).exists()
    assert main(words_of(letters, out)) == 0, "there is nothing to go on from, and nothing is missing"
    assert figures(out) == figures(uninterrupted["plain"])
    assert events(out, "resume") == []
    aside = out / "checkpoints" / ASIDE
    assert sorted(each.name for each in aside.iterdir()) == [f"{folder_of(n)}-1" for n in (2, 4, 6)]
    assert len(list((out / "previous").iterdir())) == 2


@pytest.mark.parametrize("path", ["nowhere", "file", "memory://nowhere"])
def test_a_path_without_a_checkpoint(
    path: str, letters: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    where = path if "://" in path else str(tmp_path / path)
    error = told(capsys, words_of(letters, tmp_path / "run", f"checkpoint.resume={where}"))
    assert ("cannot be read" if path == "nowhere" else "holds no whole checkpoint") in error
    assert not (tmp_path / "run").exists()


def weights_only(source: Path, target: Path) -> Path:
    """A checkpoint without the optimizer's state."""
    shutil.copytree(source, target)
    content = json.loads((target / MANIFEST).read_bytes())
    del content["hash"]
    content["kind"] = "weights"
    content["tensors"] = {key: value for key, value in content["tensors"].items() if key.startswith("weights/")}

    def canonical(table: dict[str, Any]) -> bytes:
        return json.dumps(table, sort_keys=True, separators=(",", ":")).encode()

    (target / MANIFEST).write_bytes(canonical(content | {"hash": hash_of(canonical(content))}))
    return target


def test_weights_alone_are_a_beginning_and_no_middle(
    letters: str, uninterrupted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = weights_only(uninterrupted["plain"] / "checkpoints" / folder_of(6), tmp_path / "weights")
    words = words_of(letters, tmp_path / "run", "optim.lr=0", "optim.min_lr=0", "train.steps=2")
    error = told(capsys, [*words, f"checkpoint.resume={weights}"])
    assert "holds weights alone; start from them with checkpoint.init_from" in error
    for source in (weights, uninterrupted["plain"]):
        assert main([*words, f"checkpoint.init_from={source}", "checkpoint.resume=never"]) == 0
        found, expected = last_state(tmp_path / "run", 2), last_state(uninterrupted["plain"])
        keys = [key for key in expected if key.startswith("weights/")]
        assert keys and all(found[key] == expected[key] for key in keys)
        first = figures(tmp_path / "run")[0]
        assert first["step"] == 1 and first["tokens"] == 8 * 16, "data begin anew"
