"""`megacore inspect`: what it says of checkpoints and runs is what lies there, and damage is named."""

import json
from pathlib import Path

import pytest
import torch

from megacore.checkpoint.find import LATEST, folder_of
from megacore.checkpoint.manifest import MANIFEST
from megacore.checkpoint.store import LocalStore
from megacore.checkpoint.write import commit, slices_of, write_file
from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.exits import run

MODEL = ("model.num_layers=1", "model.hidden_size=8", "model.num_heads=2", "model.vocab_size=10")
TENSORS = {"weights/a": torch.arange(600.0).view(60, 10), "optim/first/a": torch.zeros(60, 10, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder with a checkpoint of step 3 and a save of step 5 that was never finished."""
    config = resolve(load(None, MODEL), 1)
    store = LocalStore(tmp_path / "checkpoints" / folder_of(3))
    planned = [each for key, tensor in TENSORS.items() for each in slices_of(key, tensor.shape, tensor.dtype, 800)]
    parts = (TENSORS[each.key][each.start[0] : each.start[0] + each.size[0]] for each in planned)
    written = write_file(store, "rank-00000.safetensors", planned, parts)
    commit(
        store,
        [written],
        kind="training",
        step=3,
        config=config,
        layout={"tp": 2, "dp": 1, "zero": 1},
        state={"val_loss": 2.5},
        attachments={"tokenizer/a.json": b"{}"},
    )
    (tmp_path / "checkpoints" / LATEST).write_text("step-00000003\n")
    (tmp_path / "checkpoints" / folder_of(5)).mkdir()
    return tmp_path


@pytest.fixture
def inspect(capsys):
    """Runs the command: (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        code = run("megacore.tools.inspect_checkpoint", [str(word) for word in words])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def test_a_checkpoint_as_json(folder: Path, inspect) -> None:
    code, out, _ = inspect(folder / "checkpoints" / folder_of(3), "--json", "--verify")
    facts = json.loads(out)
    assert code == 0
    assert (facts["what"], facts["step"], facts["kind"]) == ("checkpoint", 3, "training")
    assert facts["groups"]["weights"] == {
        "tensors": 1, "elements": 600, "bytes": 2400, "slices": 3, "dtypes": ["F32"]
    }  # fmt: skip
    assert facts["groups"]["optim/first"]["bytes"] == 1200
    assert facts["tensors"]["weights/a"]["shape"] == [60, 10]
    assert sum(part["size"][0] for part in facts["tensors"]["weights/a"]["slices"]) == 60
    assert facts["attachments"] == {"tokenizer/a.json": 2}
    assert facts["verified"] == facts["bytes"]


def test_a_run_lists_its_checkpoints_and_shows_the_newest_whole_one(folder: Path, inspect) -> None:
    code, out, _ = inspect(folder)
    assert code == 0
    assert "never finished" in out and "2.5000" in out
    assert "tp2" in out and "step        3" in out


def test_tensors_are_listed_where_that_is_asked_for(folder: Path, inspect) -> None:
    path = folder / "checkpoints" / folder_of(3)
    assert "60 x 10" not in inspect(path)[1]
    assert "60 x 10" in inspect(path, "--tensors")[1]


def test_verify_names_the_damaged_file(folder: Path, inspect) -> None:
    path = folder / "checkpoints" / folder_of(3)
    file = path / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert inspect(path)[0] == 0
    code, _, err = inspect(path, "--verify")
    assert code == 2 and str(file) in err and "hash" in err


def test_what_is_nothing_is_refused(tmp_path: Path, inspect) -> None:
    code, _, err = inspect(tmp_path)
    assert code == 2 and MANIFEST in err and "config.json" in err
