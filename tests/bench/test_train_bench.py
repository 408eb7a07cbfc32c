"""`megacore bench train` runs every case, and refuses models that its baselines cannot compute."""

import json
from pathlib import Path

import pytest

from megacore.bench.train import CASES, OURS, check_losses, configure
from megacore.tools import bench

TINY = (
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.vocab_size=64",
    "train.seq_len=16",
    "train.global_batch_size=2",
)


@pytest.mark.parametrize("case", [case.name for case in CASES])
def test_a_case_runs_and_is_kept(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", *TINY, "--case", case, "--rounds", "2", "--json", "--output", str(tmp_path)]
    assert bench.main(arguments) == 0
    shown = json.loads(capfd.readouterr().out)
    (comparison,) = shown["comparisons"]
    assert comparison["name"] == case
    assert comparison["sides"][0]["side"] == OURS
    assert all(side["rounds"] == 2 and side["best_s"] > 0 for side in comparison["sides"])
    assert comparison["ratios"]
    assert json.loads((tmp_path / "train.json").read_text()) == shown


def test_models_that_the_baselines_do_not_know_are_refused() -> None:
    with pytest.raises(ValueError, match="model.qk_norm=True, model.sliding_window=8"):
        configure(["model.qk_norm=true", "model.sliding_window=8"])
    with pytest.raises(ValueError, match="model.activation=gelu"):
        configure(["model.activation=gelu"])
    with pytest.raises(ValueError, match="precision.fp8=current"):
        configure(["precision.fp8=current"])


def test_an_unknown_case_and_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no case 'tp3'"):
        bench.main(["train", "--case", "tp3"])
    with pytest.raises(ValueError, match="--rounds=0 must be at least 1"):
        bench.main(["train", "--rounds", "0"])


def test_sides_that_compute_different_losses_are_not_compared() -> None:
    check_losses({OURS: 9.0, "plain": 9.1})
    with pytest.raises(RuntimeError, match="different losses"):
        check_losses({OURS: 9.0, "plain": 4.5})
