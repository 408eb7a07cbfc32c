"""`megacore verify` from the command line: that it agrees where it should, and that it can fail."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megacore.data.indexed import IndexedWriter
from megacore.exits import run
from megacore.monitor.console import plain
from megacore.tools import verify as face
from megacore.verify.outcome import Outcome
from megacore.verify.screen import Table, verdict

TINY = (
    "model.num_layers=3",
    "model.hidden_size=24",
    "model.ffn_hidden_size=36",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=6",
    "model.vocab_size=103",
    "train.seq_len=16",
    "train.micro_batch_size=2",
    "train.global_batch_size=16",
)
Verify = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Verify:
    """verify(*words, ranks="a function of broken.py") -> exit code, what --json printed, stderr."""

    def call(*words: str, ranks: str = "") -> tuple[int, dict[str, Any], str]:
        if ranks:
            monkeypatch.setattr(face, "TARGET", f"tests.verify.broken:{ranks}")
        code = run("megacore.tools.verify", [*TINY, *words, "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out or "{}"), err

    return call


def problems_of(told: dict[str, Any]) -> dict[str, list[str]]:
    return {one["layout"]: one["problems"] for one in told["layouts"]}


def test_the_screen() -> None:
    layouts = "tp=2,pp=2,sequence_parallel=true;dp=2;pp=2,chunks=2,schedule=interleaved"
    command = [sys.executable, "-m", "megacore", "verify", *TINY, "--layouts", layouts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("  ✓")]
    assert [row[1:5] for row in rows] == [
        ["dp2", "2", "1", "1f1b"],
        ["pp2", "2", "4", "interleaved"],
        ["tp2", "pp2", "sequence", "4"],
    ]
    assert "✓ all 3 layouts compute what one process computes" in done.stdout
    assert "made-up tokens" in done.stdout and "twin" not in done.stdout


def test_tied_weights_dropout_and_documents(verify: Verify) -> None:
    model = ("model.family=gpt2", "model.dropout=0.1", "data.reset_attention=true", "data.reset_positions=true")
    code, told, _ = verify(*model, "--layouts", "pp=2,schedule=zb-v;tp=2,pp=2,recompute=full", "--shrink")
    assert code == 0 and told["agree"] and told["twin"] and told["dtype"] == "fp64"
    assert problems_of(told) == {"pp=2,schedule=zb-v": [], "tp=2,pp=2,recompute=full": []}
    for one in told["layouts"]:
        assert one["excess"] < 0.1 and one["loss_difference"] < 1e-13 and one["grad_norm_difference"] < 1e-13


def test_as_run(verify: Verify) -> None:
    code, told, _ = verify("--as-run", "--layouts", "tp=2;pp=2;dp=2")
    assert code == 0 and told["dtype"] == "fp32"
    assert all(0.01 < one["excess"] <= 1 for one in told["layouts"]), "no error at all would be no float32"


def test_the_runs_own_data(verify: Verify, tmp_path: Path) -> None:
    prefix = str(tmp_path / "corpus")
    with IndexedWriter(prefix, np.uint16) as writer:
        for start in range(40):
            writer.add_document(np.arange(start, start + 60) % 103)
    code, told, err = verify(f"data.blend={prefix}", "--layouts", "tp=2;dp=2")
    assert (code, err) == (0, "")
    assert told["data"] == "the first samples of the run's own data"
    assert {path.name for path in tmp_path.iterdir()} == {"corpus.bin", "corpus.idx"}, "nothing is left beside the data"


def test_sums_that_are_left_out_are_found(verify: Verify) -> None:
    code, told, _ = verify("--layouts", "dp=2;tp=2,sequence_parallel=true", ranks="without_sums_over_tp")
    good, bad = told["layouts"]
    assert (code, good["agrees"], bad["agrees"]) == (1, True, False)
    assert "norm.weight" in bad["parameter"] and bad["excess"] > 1e6
    assert any("ranks hold copies of the weight that differ in their bits" in line for line in bad["problems"])


def test_one_wrong_element_is_found(verify: Verify) -> None:
    code, told, _ = verify("--layouts", "tp=2;dp=2", ranks="slightly_off")
    good, bad = sorted(told["layouts"], key=lambda one: not one["agrees"])
    assert (code, good["layout"], bad["layout"], bad["num_beyond"]) == (1, "tp=2", "dp=2", 1)
    assert (bad["parameter"], bad["what"]) == ("layers.1.mlp.down.weight", "gradient")
    assert bad["excess"] > 1 and bad["problems"] == []


def test_copies_must_be_the_same_bits(verify: Verify) -> None:
    code, told, _ = verify("--layouts", "dp=2", ranks="copies_drift")
    drift = "final_norm.weight: ranks hold copies of the weight that differ in their bits"
    assert (code, problems_of(told)) == (1, {"dp=2": [drift]})
    assert told["layouts"][0]["excess"] < 1


def test_nan_is_no_agreement(verify: Verify) -> None:
    code, told, _ = verify("--layouts", "dp=2", ranks="nan_gradient")
    bad = told["layouts"][0]
    assert (code, bad["parameter"], bad["excess"], bad["agrees"]) == (1, "final_norm.weight", None, False)


@pytest.mark.parametrize(("how", "cause"), [("one_raises", "KeyError"), ("one_dies", "SIGKILL")])
def test_a_rank_that_fails_ends_it_and_the_layout_is_named(verify: Verify, how: str, cause: str) -> None:
    began = time.monotonic()
    code, told, err = verify("--layouts", "pp=2,schedule=zb-h1", ranks=how)
    assert (code, told) == (1, {})
    assert cause in err and "Traceback" not in err
    assert 'it was in layout pp=2,schedule=zb-h1 (2 of 2); --layouts "pp=2,schedule=zb-h1" runs it alone' in err
    assert time.monotonic() - began < 30


def test_wrong_input_starts_nothing(verify: Verify) -> None:
    code, told, err = verify("--layouts", "tp=3;cp=2;tpp=1;tp=4,dp=4")
    assert (code, told) == (2, {})
    assert err.startswith("megacore: 5 problems:\n") and "Traceback" not in err
    assert run("megacore.tools.verify", []) == 2


def test_a_layout_that_differs_says_why() -> None:
    outcome = Outcome(
        "tp=2", "tp2", 2, 1, "1f1b", "none", 4, 6.9, 0.01, 1.0, 0.0, "layers.0.mlp.up.weight", "gradient", 3.25, 7, 0.5,
        ("loss 6.9, of one process 6.8: more than 7e-10 apart",),
    )  # fmt: skip
    lines = list(Table((6, 5, 6, 4, 9, 5, 15, 8, 5, 6), colour=False).lines(outcome))
    assert lines[0].startswith("  ✗ tp2 ") and "0.mlp.up" in lines[0] and "3.25" in lines[0]
    differs = "layers.0.mlp.up.weight: the gradient differs by 3.25 times the bound"
    assert lines[1:] == [
        f"      {differs}, and 6 more parameters are beyond it",
        "      loss 6.9, of one process 6.8: more than 7e-10 apart",
    ]
    last = verdict([outcome], plain)
    assert "✗ 1 of 1 layouts do not compute" in last and '--layouts "tp=2"' in last
