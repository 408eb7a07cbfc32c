"""`megacore train` from the command line to the run's folder: every layout writes down the same run."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megacore.data.indexed import IndexedWriter
from megacore.exits import run
from megacore.launch.train import main
from megacore.monitor.jsonl import read_json_lines
from megacore.monitor.run_folder import EVENTS, LOG, METRICS
from megacore.train.loop import Loop

EOD = 256  # of the bytes tokenizer
STEPS = 5
BASE = (
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.ffn_hidden_size=24",
    "model.num_heads=4",
    "model.num_kv_heads=1",  # less than tp
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
)
FEATURES = {
    "documents": (
        "data.reset_positions=true",
        "data.reset_attention=true",
        "data.mask_eod_loss=true",
        "train.batch_ramp=4,4,8",
        "parallel.schedule=gpipe",
        "model.dropout=0.1",
        "model.attention_dropout=0.1",
        "optim.clip=adagc",
        "optim.adagc_warmup_steps=1",
        'optim.groups=["layers.0.*: lr_scale=0.5, weight_decay=0.2"]',
        'optim.freeze=["layers.1.attention.out.weight"]',
        "log.statistics_every=3",
    ),
    "tied": (
        "model.tie_embeddings=true",
        "model.position=learned",
        "model.qk_norm=true",
        "train.z_loss=0.01",
        "log.every=2",
        "log.sample_every=4",
        'log.sample_prompts=["ab"]',
        "log.sample_tokens=4",
    ),
}
LAYOUTS = {
    "tp": ("parallel.tp=2", "parallel.sequence_parallel=true"),
    "dp": ("parallel.dp=2",),
    "zero": ("parallel.dp=2", "parallel.zero=3"),
    "pp": ("parallel.pp=2",),
    "offload": ("parallel.dp=2", "parallel.zero=1", "optim.offload=cpu", "parallel.recompute=offload"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Runs of one process compute here, and are far too small to be shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Letters in documents of uneven length."""
    generator = np.random.default_rng(1)
    prefix = str(tmp_path_factory.mktemp("data") / "letters")
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in generator.integers(3, 40, 60):
            writer.add_document([*generator.choice([97, 98, 99], length, p=(0.7, 0.2, 0.1)), EOD])
    return prefix


@pytest.fixture(scope="module")
def alone(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each feature's run in one process."""
    folders = {}
    for name, features in FEATURES.items():
        folders[name] = tmp_path_factory.mktemp(name) / "run"
        assert main([*BASE, *features, "--preset", "demo", f"data.blend={corpus}", f"out={folders[name]}"]) == 0
    return folders


def figures(out: Path) -> list[dict]:
    """The metrics that must not depend on the machine."""
    names = ("step", "loss", "grad_norm", "val_loss", "lr", "tokens", "skipped")
    records = read_json_lines(out / METRICS)
    return [{name: record[name] for name in names if name in record} | statistics(record) for record in records]


def statistics(record: dict) -> dict[str, float]:
    """Those of a step that has some, by dotted name."""
    found = {}
    for name, figure in record.get("statistics", {}).items():
        by_part = figure.items() if isinstance(figure, dict) else [("all", figure)]
        found |= {f"{name}.{part}": value for part, value in by_part}
    return found


def events(out: Path, name: str) -> list[dict]:
    return [event for event in read_json_lines(out / EVENTS) if event["event"] == name]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FEATURES)
def test_every_layout_writes_down_the_same_run(
    name: str, layout: str, corpus: str, alone: dict[str, Path], tmp_path: Path
) -> None:
    words = [*BASE, *FEATURES[name], *LAYOUTS[layout], f"data.blend={corpus}", f"out={tmp_path}", "--nproc", "2"]
    assert main(["--preset", "demo", *words]) == 0
    expected = figures(alone[name])
    ours = figures(tmp_path)
    assert [record.keys() for record in ours] == [record.keys() for record in expected]
    for a, b in zip(ours, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=0)
    texts = [[event["text"] for event in events(out, "sample")] for out in (tmp_path, alone[name])]
    assert texts[0] == texts[1]


def test_what_a_run_writes(alone: dict[str, Path]) -> None:
    documents, tied = figures(alone["documents"]), figures(alone["tied"])
    assert [record["step"] for record in documents] == [1, 2, 3, 4, 5]
    assert [record["step"] for record in tied] == [1, 2, 4, 5]
    for records in (documents, tied):
        assert [record["step"] for record in records if "val_loss" in record] == [2, 4, 5]
        assert records[-1]["loss"] < records[0]["loss"]
    assert [record["tokens"] // 16 for record in documents] == [4, 8, 16, 24, 32]  # the batch grows after 8 samples
    assert [record["step"] for record in documents if "update_norm.mlp" in record] == [3, 5]
    assert {record["clipped_fraction.all"] for record in documents if "update_norm.mlp" in record} != {0.0}
    assert not any("update_norm.mlp" in record for record in tied)
    assert [event["step"] for event in events(alone["tied"], "sample")] == [4, 5]
    assert [event["event"] for event in read_json_lines(alone["documents"] / EVENTS)] == ["start", "finish"]


def test_a_run_trains_again_from_its_own_config(alone: dict[str, Path], tmp_path: Path) -> None:
    again = tmp_path / "again"
    for number in (0, 1):
        assert main([str(alone["tied"] / "config.toml"), f"out={again}"]) == 0
        assert figures(again) == figures(alone["tied"])
        assert len(list(again.glob("previous/*"))) == number  # the run before is put aside
    assert figures(again / "previous" / "1") == figures(alone["tied"])


def test_a_run_that_skips_all_says_so(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "demo", *BASE, f"data.blend={corpus}", f"out={tmp_path}", "train.eval_every=0"]
    more = ["train.steps=30", "optim.warmup_steps=0", "optim.lr=1e200", "log.every=25"]
    assert main([*words, *more]) == 0
    (warning,) = events(tmp_path, "warning")
    assert warning["step"] == 25
    skipped = sum(event["count"] for event in events(tmp_path, "skip"))
    assert skipped > 25
    assert f"{skipped} of 30 steps skipped" in capsys.readouterr().out.splitlines()[-1]


def test_a_fault_is_in_the_folder(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(loop: Loop, first_step: int) -> None:
        raise KeyError("the cause")

    monkeypatch.setattr(Loop, "run", fail)
    words = ["--preset", "demo", *BASE, f"data.blend={corpus}", f"out={tmp_path}"]
    assert run("megacore.launch.train", words) == 1
    assert "Traceback" in capsys.readouterr().err
    assert events(tmp_path, "fault")[0]["error"] == "KeyError: 'the cause'"
    assert "fault: KeyError: 'the cause'" in (tmp_path / LOG).read_text()
