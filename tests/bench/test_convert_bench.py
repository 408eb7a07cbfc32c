"""`megacore bench convert` times whole commands of both sides, and knows what memory they take."""

import json
import sys
from pathlib import Path

import pytest

from megacore.bench.convert import RIVAL, run
from megacore.bench.train import OURS
from megacore.tools import bench

TINY = (
    "model.num_layers=1",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.vocab_size=64",
)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["from-hf-1", "to-hf-2"])
def test_a_case_runs_and_is_kept(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    arguments = ["convert", *TINY, "--case", case, "--rounds", "1", "--json", "--output", str(tmp_path)]
    assert bench.main(arguments) == 0
    shown = json.loads(capfd.readouterr().out)
    (comparison,) = shown["comparisons"]
    assert [side["side"] for side in comparison["sides"]] == [OURS, RIVAL]
    assert comparison["settings"][f"peak GB {OURS}"] > 0.05
    assert json.loads((tmp_path / "convert.json").read_text()) == shown


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_the_memory_of_a_command_and_its_children_is_seen() -> None:
    child = "import time; x = bytearray(60_000_000); time.sleep(0.6)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    assert 60e6 < run([sys.executable, "-c", code]) < 200e6


def test_a_command_that_fails_is_told_with_its_own_words() -> None:
    with pytest.raises(RuntimeError, match="no such luck"):
        run([sys.executable, "-c", "raise SystemExit('no such luck')"])
