"""The laptop tour from end to end, with a few steps; and the second call, which does nothing twice."""

import json
import re
import subprocess
import sys

import pytest

from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.config.validate import check
from megacore.demo.run_file import run_file_text
from megacore.demo.tokenizer import vocabulary_for


def demo(folder, *words, timeout=300):
    command = [sys.executable, "-m", "megacore", "demo", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
def test_the_whole_tour_twice(tmp_path):
    first = demo(tmp_path, "--fast", "--steps", "8")
    assert first.returncode == 0, first.stdout + first.stderr
    out = tmp_path / "runs" / "demo"
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps] == list(range(1, 9))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    assert "val_loss" in steps[-1]
    for name in (
        "corpus.jsonl",
        "tokenizer.model",
        "data/corpus.bin",
        "data/corpus.idx",
        "run.toml",
        "log.txt",
        "events.jsonl",
    ):
        assert (out / name).stat().st_size > 0, name
    for words in (
        "1 · Text",
        "2 · Tokenizer",
        "3 · Dataset",
        "4 · Training",
        "6 · Loss",
        "after 8 steps",
        "What to try next",
    ):
        assert words in first.stdout
    assert "\x1b" not in first.stdout
    check(load(str(out / "run.toml")), 4)

    before = (out / "metrics.jsonl").read_bytes()
    second = demo(tmp_path, "--fast", "--steps", "8", timeout=60)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("unchanged since last time") == 5
    assert (out / "metrics.jsonl").read_bytes() == before
    assert "after 8 steps" in second.stdout

    inspect = next(line for line in first.stdout.splitlines() if "data inspect" in line).strip()
    words = re.sub(r"^.*?data inspect", "data inspect", inspect).split()
    shown = subprocess.run(
        [sys.executable, "-m", "megacore", *words], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0, shown.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "nowhere.txt"], "--text nowhere.txt: there is no such file or folder"),
        (["--text", "tiny.txt"], "too few to learn from"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
    ],
)
def test_wrong_input_is_told_in_a_line(tmp_path, words, message):
    (tmp_path / "tiny.txt").write_text("a few words")
    done = demo(tmp_path, *words, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("num_bytes", "tokens"), [(20_000, 512), (500_000, 1024), (1_000_000, 2048), (4_000_000, 4096), (10**10, 4096)]
)
def test_vocabulary_grows_with_the_text(num_bytes, tokens):
    assert vocabulary_for(num_bytes) == tokens


def test_the_run_file_says_the_run(tmp_path):
    config = resolve(
        load(None, ['out=a "b"', "model.rope_scaling.factor=2.0", 'log.sample_prompts=["x\\n"]'], "demo"), 4
    )
    (tmp_path / "run.toml").write_text(run_file_text(config))
    assert load(str(tmp_path / "run.toml")) == config
