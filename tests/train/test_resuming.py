"""Runs that go on, from the command line: what is written down is what an uninterrupted run would have written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megacore.checkpoint.find import ASIDE, LATEST, folder_of
from megacore.checkpoint.manifest import MANIFEST, hash_of
from megacore.checkpoint.read import Checkpoint
from megacore.data.indexed import IndexedWriter
from megacore.data.sampler import Batch, BatchPlan
from megacore.exits import run
from megacore.launch.train import main
from megacore.model.inputs import Inputs
from megacore.monitor.jsonl import read_json_lines
from megacore.monitor.run_folder import EVENTS, LOG, METRICS
from megacore.train.failpoints import VARIABLE, Provoked
from megacore.train.feed import Feed
from megacore.train.loop import Loop
from tests.checkpoint.common import digests

EOD, STEPS = 256, 6
BASE = (
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.ffn_hidden_size=24",
    "model.num_heads=4",
    "model.num_kv_heads=1",
    "model.dropout=0.1",
    "data.tokenizer=bytes",
    "data.split=8,2,0",
    "train.seq_len=16",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    f"train.steps={STEPS}",
    "train.eval_every=2",
    "train.eval_steps=2",
    "train.device=cpu",
    "optim.lr=0.01",
    "optim.warmup_steps=2",
    "precision.dtype=fp64",
    "checkpoint.save_every=2",
)
FEATURES = {
    "plain": (),
    "ramp": (
        "train.batch_ramp=4,4,8",
        "optim.clip=adagc",
        "optim.adagc_warmup_steps=1",
        "log.every=2",
        "checkpoint.async_save=false",
    ),
}
LAYOUTS = {
    "tp": ("parallel.tp=2", "parallel.sequence_parallel=true"),
    "zero": ("parallel.dp=2", "parallel.zero=3"),
    "pp": ("parallel.pp=2", "parallel.schedule=zb-v"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_corpus(prefix: str, seed: int) -> str:
    """Letters in documents of uneven length, many times more than a run reads."""
    generator = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in generator.integers(3, 40, 300):
            writer.add_document([*generator.choice([97, 98, 99], length, p=(0.7, 0.2, 0.1)), EOD])
    return prefix


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(str(tmp_path_factory.mktemp("data") / "letters"), 1)


def words_of(corpus: str, out: Path, *words: str) -> list[str]:
    return ["--preset", "demo", *BASE, f"data.blend={corpus}", f"out={out}", *words]


@pytest.fixture(scope="module")
def alone(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each feature's uninterrupted run in one process."""
    folders = {}
    for name, features in FEATURES.items():
        folders[name] = tmp_path_factory.mktemp(name) / "run"
        assert main(words_of(corpus, folders[name], *features)) == 0
    return folders


def figures(out: Path) -> list[dict[str, Any]]:
    """What must not depend on the machine, nor on how often a run was interrupted."""
    names = ("step", "loss", "grad_norm", "val_loss", "lr", "tokens", "skipped")
    return [{name: each[name] for name in names if name in each} for each in read_json_lines(out / METRICS)]


def events(out: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_json_lines(out / EVENTS) if event["event"] == name]


def last_state(out: Path, step: int = STEPS) -> dict[str, str]:
    return digests(str(out / "checkpoints"), step)


def interrupted(monkeypatch: pytest.MonkeyPatch, step: int, words: list[str]) -> None:
    """Start a run of one process that ends with a fault before a step."""
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, f"step:0:{step}:raise")
        with pytest.raises(Provoked):
            main(words)


def killed(fault: str, words: list[str]) -> str:
    """Start a run in a process of its own, which a signal ends, or one of its ranks; what it said of it."""
    command = [sys.executable, "-m", "megacore", "train", *words]
    environment = os.environ | {VARIABLE: fault, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode not in (0, 2), done.stderr
    return done.stderr


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def told(capsys: pytest.CaptureFixture[str], words: list[str], code: int = 2) -> str:
    """Start a run that is refused; what it says, all of it before anything is trained."""
    capsys.readouterr()
    assert run("megacore.launch.train", words) == code
    error = capsys.readouterr().err
    assert ("Traceback" in error) == (code == 1)
    return error


@pytest.mark.parametrize("name", FEATURES)
def test_the_same_command_goes_on(
    name: str, corpus: str, alone: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = words_of(corpus, tmp_path, *FEATURES[name])
    interrupted(monkeypatch, 4, words)
    interrupted(monkeypatch, 6, words)
    assert main(words) == 0
    assert figures(tmp_path) == figures(alone[name])
    assert last_state(tmp_path) == last_state(alone[name])
    assert [event["step"] for event in events(tmp_path, "resume")] == [2, 4]
    assert [event["changes"] for event in events(tmp_path, "resume")] == [[], []]
    assert not (tmp_path / "previous").exists()


def test_a_finished_run_does_nothing_more(
    corpus: str, alone: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(alone["plain"], tmp_path / "run")
    before = last_state(tmp_path / "run")
    for more in ((), ("train.steps=5",)):
        capsys.readouterr()
        assert main(words_of(corpus, tmp_path / "run", *more)) == 0
        assert "nothing is left to do" in capsys.readouterr().out
        assert figures(tmp_path / "run") == figures(alone["plain"])
        assert last_state(tmp_path / "run") == before


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_started_again(ranks: int, corpus: str, alone: dict[str, Path], tmp_path: Path) -> None:
    """SIGKILL: nobody has time to say goodbye."""
    layout = () if ranks == 1 else (*LAYOUTS["zero"], "--nproc", "2")
    words = words_of(corpus, tmp_path / "run", *layout)
    killed(f"step:{ranks - 1}:6:kill", words)
    assert [record["step"] for record in figures(tmp_path / "run")][:4] == [1, 2, 3, 4]
    assert main(words) == 0
    expected = alone["plain"]
    if ranks == 2:
        expected = tmp_path / "whole"
        assert main(words_of(corpus, expected, *layout)) == 0
    assert figures(tmp_path / "run") == figures(expected)
    assert last_state(tmp_path / "run") == last_state(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "rank"),
    [*product(("write#1", "write#9", "fsync#1"), (0, 1)), ("rename#1", 0), ("rename#2", 0), ("remove#1", 0)],
)
def test_killed_in_a_save(point: str, rank: int, corpus: str, tmp_path: Path) -> None:
    """Of two ranks one dies in the third save, which takes the first checkpoint away."""
    words = words_of(corpus, tmp_path / "run", *LAYOUTS["zero"], "checkpoint.keep=2", "--nproc", "2")
    assert "SIGKILL" in killed(f"{point}:{rank}:6:kill", words)
    assert Checkpoint.open(str(tmp_path / "run")).manifest.step in (4, 6)
    assert main(words) == 0
    whole = tmp_path / "whole"
    assert main(words_of(corpus, whole, *LAYOUTS["zero"], "checkpoint.keep=2", "--nproc", "2")) == 0
    assert figures(tmp_path / "run") == figures(whole)
    assert last_state(tmp_path / "run") == last_state(whole)
    folders = sorted(each.name for each in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert folders[-2:] == [folder_of(4), folder_of(6)]
    # once the last checkpoint is there nothing is left to do, and nothing is saved that would take others away
    assert len(folders) == 2 or point in ("rename#2", "remove#1")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_goes_on(
    layout: str, corpus: str, alone: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(monkeypatch, 4, words_of(corpus, tmp_path))
    assert main(words_of(corpus, tmp_path, *LAYOUTS[layout], "--nproc", "2")) == 0
    (resume,) = events(tmp_path, "resume")
    assert resume["step"] == 2 and resume["samples"] == 16
    assert resume["changes"] and all(change.endswith("(safe)") for change in resume["changes"])
    for ours, expected in zip(figures(tmp_path), figures(alone["plain"]), strict=True):
        assert ours == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_takes_up_what_two_left(layout: str, corpus: str, alone: dict[str, Path], tmp_path: Path) -> None:
    killed("step:1:6:kill", words_of(corpus, tmp_path, *LAYOUTS[layout], "--nproc", "2"))
    assert main(words_of(corpus, tmp_path)) == 0
    for ours, expected in zip(figures(tmp_path), figures(alone["plain"]), strict=True):
        assert ours == pytest.approx(expected, rel=1e-9, abs=0)


def test_other_batches_and_rates_go_on_at_the_next_sample(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ordinals: list[list[int]] = []
    step_of_feed = Feed.step

    def watched(feed: Feed, step: int) -> list[Inputs]:
        microbatches = step_of_feed(feed, step)
        ordinals.append([int(ordinal) for inputs in microbatches for ordinal in inputs.ordinal_b])
        return microbatches

    interrupted(monkeypatch, 4, words_of(corpus, tmp_path))
    monkeypatch.setattr(Feed, "step", watched)
    capsys.readouterr()
    assert main(words_of(corpus, tmp_path, "train.global_batch_size=4", "optim.lr=0.02")) == 0
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


def test_a_run_is_made_longer(corpus: str, tmp_path: Path) -> None:
    """Past the end of an epoch, too: the order of samples does not depend on how many there will be."""
    more = ("optim.lr_schedule=constant", "train.global_batch_size=64", "train.eval_every=0")
    assert main(words_of(corpus, tmp_path / "run", *more, "train.steps=4")) == 0
    assert main(words_of(corpus, tmp_path / "run", *more, "train.steps=8")) == 0
    assert main(words_of(corpus, tmp_path / "whole", *more, "train.steps=8")) == 0
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
    assert last_state(tmp_path / "run", 8) == last_state(tmp_path / "whole", 8)
    assert "train.steps: 4 -> 8 (safe)" in events(tmp_path / "run", "resume")[0]["changes"]


def test_the_best_checkpoint_stays(corpus: str, tmp_path: Path) -> None:
    """Also where a text was sampled after the evaluation."""
    sampled = ("log.sample_every=2", 'log.sample_prompts=["ab"]', "log.sample_tokens=2")
    assert main(words_of(corpus, tmp_path, *sampled, "checkpoint.keep=1", "checkpoint.keep_best=1")) == 0
    losses = {record["step"]: record["val_loss"] for record in figures(tmp_path) if "val_loss" in record}
    best = min(losses, key=lambda step: losses[step])
    folders = {each.name for each in (tmp_path / "checkpoints").glob("step-*")}
    assert folders == {folder_of(best), folder_of(STEPS)}
    assert Checkpoint.open(str(tmp_path)).manifest.state["val_loss"] == losses[STEPS]


def test_state_that_was_not_kept_begins_anew(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, 4, words_of(corpus, tmp_path))
    assert main(words_of(corpus, tmp_path, "optim.clip=adagc", "optim.adagc_warmup_steps=1")) == 0
    assert "optim.clip: norm -> adagc (changes the maths)" in events(tmp_path, "resume")[0]["changes"]
    checkpoint = Checkpoint.open(str(tmp_path))
    assert checkpoint.read_key("state/clip/clock", (), ()).item() == 4


def test_moments_that_were_not_kept_are_asked_for(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(corpus, tmp_path, "optim.name=sgd", "optim.momentum=0")
    interrupted(monkeypatch, 4, words)
    error = told(capsys, [*words, "optim.momentum=0.9"])
    assert "has no velocity, which the optimizer keeps with these settings; set them back" in error
    assert "Traceback" not in error


def test_what_cannot_change_is_refused_at_once(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(monkeypatch, 4, words_of(corpus, tmp_path))
    before = files_in(tmp_path)
    other = ("model.num_layers=3", "train.seed=5", "optim.name=lion", "data.split=7,3,0", "data.temperature=2")
    error = told(capsys, words_of(corpus, tmp_path, *other))
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


def test_data_may_move(alone: dict[str, Path], corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, 4, words_of(corpus, tmp_path / "run"))
    for suffix in (".bin", ".idx", ".meta.json"):
        if Path(corpus + suffix).exists():
            shutil.copy(corpus + suffix, tmp_path / f"moved{suffix}")
    assert main(words_of(str(tmp_path / "moved"), tmp_path / "run")) == 0
    assert figures(tmp_path / "run") == figures(alone["plain"])
    (change,) = events(tmp_path / "run", "resume")[0]["changes"]
    assert change.startswith("data.blend") and change.endswith("(safe)")


def test_a_run_goes_back(corpus: str, alone: dict[str, Path], tmp_path: Path) -> None:
    """To an earlier checkpoint of its own: what was newer stays, beside."""
    out = tmp_path / "run"
    shutil.copytree(alone["plain"], out)
    assert main(words_of(corpus, out, f"checkpoint.resume={out / 'checkpoints' / folder_of(2)}")) == 0
    assert figures(out) == figures(alone["plain"])
    assert last_state(out) == last_state(alone["plain"])
    aside = out / "checkpoints" / ASIDE
    assert sorted(each.name for each in aside.iterdir()) == [f"{folder_of(4)}-1", f"{folder_of(6)}-1"]
    assert not (out / "previous").exists()
    assert Checkpoint.open(str(out)).manifest.step == 6


def test_another_run_is_gone_on_from(corpus: str, alone: dict[str, Path], tmp_path: Path) -> None:
    """In a folder where an older run was: its files and checkpoints are put aside, and none of them is taken for this
    one's."""
    out = tmp_path / "run"
    assert main(words_of(corpus, out, "train.steps=8", "train.seed=9")) == 0
    source = alone["plain"] / "checkpoints" / folder_of(4)
    words = words_of(corpus, out, f"checkpoint.resume={source}", "train.steps=6")
    assert main(words) == 0
    assert [record["step"] for record in figures(out)] == [5, 6]
    assert figures(out) == figures(alone["plain"])[4:]
    assert last_state(out) == last_state(alone["plain"])
    assert (out / "previous" / "1" / METRICS).exists()
    assert sorted(each.name for each in (out / "checkpoints").glob("step-*")) == [folder_of(6)]
    assert (out / "checkpoints" / LATEST).read_text() == f"{folder_of(6)}\n"
    whole_run = words_of(corpus, tmp_path / "other", f"checkpoint.resume={alone['plain']}", "train.steps=7")
    assert main(whole_run) == 0
    assert [record["step"] for record in figures(tmp_path / "other")] == [7]


def test_never_begins_anew(
    corpus: str, alone: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(alone["plain"], out)
    words = words_of(corpus, out, "checkpoint.resume=never")
    interrupted(monkeypatch, 2, words)  # before anything was saved
    assert not (out / "checkpoints" / LATEST).exists()
    assert main(words_of(corpus, out)) == 0, "there is nothing to go on from, and nothing is missing"
    assert figures(out) == figures(alone["plain"])
    assert events(out, "resume") == []
    aside = out / "checkpoints" / ASIDE
    assert sorted(each.name for each in aside.iterdir()) == [f"{folder_of(n)}-1" for n in (2, 4, 6)]
    assert len(list((out / "previous").iterdir())) == 2


def test_a_damaged_checkpoint_is_passed_over(corpus: str, alone: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(alone["plain"], out)
    spoilt = out / "checkpoints" / folder_of(6) / "rank-00000.safetensors"
    data = bytearray(spoilt.read_bytes())
    data[len(data) // 2] ^= 16
    spoilt.write_bytes(data)
    assert main(words_of(corpus, out)) == 0
    (resume,) = events(out, "resume")
    (reason,) = resume["rejected"]
    assert resume["step"] == 4 and f"{spoilt} was damaged" in reason
    assert f"passed over: {reason}" in (out / LOG).read_text()
    assert figures(out) == figures(alone["plain"])
    assert last_state(out) == last_state(alone["plain"])
    assert (out / "checkpoints" / ASIDE / f"{folder_of(6)}-1").exists()


def test_nothing_whole_is_no_new_beginning(
    corpus: str, alone: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(alone["plain"], out)
    folders = sorted((out / "checkpoints").glob("step-*"))
    for folder in folders:
        (folder / "rank-00000.safetensors").unlink()
    error = told(capsys, words_of(corpus, out))
    assert error.count("rank-00000.safetensors is missing") == 3
    assert "restore one, or set checkpoint.resume=never to begin anew" in error
    for folder in folders:
        (folder / MANIFEST).unlink()
    assert "holds no whole checkpoint" in told(capsys, words_of(corpus, out))
    assert figures(out) == figures(alone["plain"])


@pytest.mark.parametrize("path", ["nowhere", "file", "memory://nowhere"])
def test_a_path_without_a_checkpoint(
    path: str, corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    where = path if "://" in path else str(tmp_path / path)
    error = told(capsys, words_of(corpus, tmp_path / "run", f"checkpoint.resume={where}"))
    assert "holds no whole checkpoint" in error
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
    corpus: str, alone: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = weights_only(alone["plain"] / "checkpoints" / folder_of(6), tmp_path / "weights")
    words = words_of(corpus, tmp_path / "run", "optim.lr=0", "optim.min_lr=0", "train.steps=2")
    error = told(capsys, [*words, f"checkpoint.resume={weights}"])
    assert "holds weights alone; start from them with checkpoint.init_from" in error
    for source in (weights, alone["plain"]):
        assert main([*words, f"checkpoint.init_from={source}", "checkpoint.resume=never"]) == 0
        found, expected = last_state(tmp_path / "run", 2), last_state(alone["plain"])
        keys = [key for key in expected if key.startswith("weights/")]
        assert keys and all(found[key] == expected[key] for key in keys)
        first = figures(tmp_path / "run")[0]
        assert first["step"] == 1 and first["tokens"] == 8 * 16, "data begin anew"


def test_a_full_disk_does_not_stop_a_run(
    corpus: str, alone: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "write#3:0:4:enospc")
    assert main(words_of(corpus, tmp_path)) == 0
    (failed,) = events(tmp_path, "save_failed")
    assert failed["step"] == 4 and "No space left on device" in failed["reason"]
    assert [event["step"] for event in events(tmp_path, "save")] == [2, 6]
    assert figures(tmp_path) == figures(alone["plain"])
    assert sorted(each.name for each in (tmp_path / "checkpoints").glob("step-*")) == [folder_of(2), folder_of(6)]


def test_a_run_whose_end_is_not_saved_fails(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, "write#3:0:6:enospc")
    error = told(capsys, words_of(corpus, tmp_path), code=1)
    assert "step 6 could not be saved" in error and "No space left on device" in error
    assert "step 6 could not be saved" in events(tmp_path, "fault")[0]["error"]
    monkeypatch.delenv(VARIABLE)
    assert main(words_of(corpus, tmp_path)) == 0
    assert events(tmp_path, "resume")[0]["step"] == 4


def test_a_folder_that_cannot_be_written(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be made" in told(capsys, words_of(corpus, tmp_path / "file" / "run"))
    assert "cannot be made" in told(capsys, words_of(corpus, tmp_path / "file"))


def test_a_run_that_has_come_to_nothing_is_saved(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its validation loss is no number, which JSON has not."""
    monkeypatch.setattr(Loop, "evaluate", lambda loop: torch.tensor(torch.nan))
    more = ("checkpoint.keep_best=1",)
    assert main(words_of(corpus, tmp_path, *more)) == 0
    assert [event["step"] for event in events(tmp_path, "save")] == [2, 4, 6]
    assert "val_loss" not in Checkpoint.open(str(tmp_path)).manifest.state


def test_checkpoints_in_an_object_store(
    corpus: str, alone: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec")
    folder = f"memory://{tmp_path.name}/checkpoints"
    words = words_of(corpus, tmp_path, f"checkpoint.folder={folder}")
    interrupted(monkeypatch, 6, words)
    assert main(words) == 0
    assert figures(tmp_path) == figures(alone["plain"])
    assert digests(folder, STEPS) == last_state(alone["plain"])
    assert events(tmp_path, "resume")[0]["step"] == 4
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_two_ranks_and_an_object_store(corpus: str, tmp_path: Path) -> None:
    """A folder of this machine, as fsspec has it."""
    folder = f"local://{tmp_path / 'far'}"
    words = words_of(corpus, tmp_path / "run", f"checkpoint.folder={folder}", *LAYOUTS["zero"], "--nproc", "2")
    killed("write#9:1:4:kill", words)
    assert main(words) == 0
    whole = tmp_path / "whole"
    assert main(words_of(corpus, whole, *LAYOUTS["zero"], "--nproc", "2")) == 0
    assert figures(tmp_path / "run") == figures(whole)
    assert digests(folder, STEPS) == last_state(whole)
