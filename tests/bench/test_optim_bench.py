"""`megacore bench optim` times every optimizer that there is, and reckons its bytes."""

import csv
import json
from pathlib import Path

import pytest
import torch

from megacore.bench import optim_report
from megacore.bench.harness import comparison
from megacore.bench.optim import CASES, COPY, TORCH, Measured, Side, Weights, _rule_step, _torch_step, measure
from megacore.bench.train import configure
from megacore.config.optimizers import defaults, optimizer_names
from megacore.optim.formats import StateFormat
from megacore.optim.rules import make_rule
from megacore.tools import bench

TINY = ("model.num_layers=1", "model.hidden_size=16", "model.ffn_hidden_size=24", "model.num_heads=2",
        "model.num_kv_heads=1", "model.vocab_size=32")  # fmt: skip


def test_a_case_is_shown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["optim", "--case", "bf16", "--rounds", "2", "--json", "--output", str(tmp_path), *TINY]) == 0
    shown = json.loads(capsys.readouterr().out)
    (case,) = shown["cases"]
    rows = {row["side"]: row for row in case["sides"]}
    assert rows.keys() == {COPY, TORCH, *optimizer_names()}
    assert rows["adamw"]["state_bytes_per_parameter"] == 4.0 and rows[TORCH]["state_bytes_per_parameter"] == 8.0
    assert rows["sgd"]["state_bytes_per_parameter"] == 0.0
    assert all(row["gb_per_s"] > 0 for row in rows.values())
    assert json.loads((tmp_path / "optim.json").read_text()) == shown
    assert len(list(csv.DictReader((tmp_path / "optim.csv").open()))) == len(rows)


def test_bandwidth_counts_what_a_step_must_move() -> None:
    seconds = {COPY: [0.5, 0.5], TORCH: [2.0, 2.0], "adamw": [1.0, 1.0]}
    sides = {COPY: Side(8, 0), TORCH: Side(28, 8), "adamw": Side(28, 8, "native (avx2)")}
    measured = Measured(comparison("told", "adamw", seconds, {"threads": 2}), sides, 10**9)
    adamw = optim_report.as_dict(measured)["sides"][2]
    assert adamw["gb_per_s"] == 28.0 and adamw["share_of_copy"] == 28 / 16 and adamw["faster_than_torch"] == 2.0
    text = optim_report.table([measured])
    assert "28.0     175%          2.00x      8.00  native (avx2)" in text
    assert text.splitlines()[-1].endswith("2.00x best, 2.00x median, 2.00x by rounds")


def test_the_case_of_adamw_alone_leaves_the_others_out() -> None:
    measured = measure(CASES[0], configure(TINY), rounds=1)
    assert list(measured.sides) == [COPY, TORCH, "adamw"]


def test_both_adamws_do_the_same() -> None:
    """With one learning rate and one weight decay for each parameter."""
    mine, theirs = Weights(configure(TINY)), Weights(configure(TINY))
    ours = _rule_step(make_rule("adamw", mine.share(StateFormat()), defaults("adamw")), mine)
    torchs = _torch_step(theirs)
    before = mine.weights.clone()
    for _ in range(3):
        ours()
        torchs()
    change, other = mine.weights - before, theirs.weights - before
    assert change.abs().max() > 0
    torch.testing.assert_close(change, other, rtol=0.02, atol=1e-8)  # of a change of 1e-6, float32 keeps little
