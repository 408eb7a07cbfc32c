"""Runs in 16 bits on real text end where one in 32 bits does, and those in 8 where one in 16 does, from the command
line on."""

import argparse
import inspect
from pathlib import Path

import numpy as np
import pytest

from megacore.data.indexed import IndexedWriter
from megacore.launch.train import main
from megacore.monitor.jsonl import read_json_lines
from megacore.monitor.run_folder import METRICS

EOD = 256  # of the bytes tokenizer
BASE = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_heads=4",
    "data.tokenizer=bytes",
    "data.split=1,0,0",
    "train.seq_len=64",
    "train.micro_batch_size=4",
    "train.global_batch_size=8",
    "train.steps=40",
    "train.eval_every=0",
    "train.device=cpu",
    "optim.lr=0.003",
    "optim.warmup_steps=5",
)
RUNS = {
    "bf16": ("precision.dtype=bf16", "precision.grad_reduce_dtype=bf16"),
    "bf16 split zero3": ("precision.dtype=bf16", "precision.master=split", "parallel.dp=2", "parallel.zero=3"),
    "fp16 tp2": ("precision.dtype=fp16", "parallel.tp=2", "parallel.sequence_parallel=true"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A module of the standard library, a document for each of its paragraphs."""
    prefix = str(tmp_path_factory.mktemp("data") / "source")
    with IndexedWriter(prefix, np.uint16) as writer:
        for paragraph in inspect.getsource(argparse).split("\n\n"):
            writer.add_document([*paragraph.encode(), EOD])
    return prefix


def losses(corpus: str, out: Path, *words: str) -> list[float]:
    ranks = 2 if any(word in ("parallel.dp=2", "parallel.tp=2") for word in words) else 1
    launch = ["--preset", "demo", f"data.blend={corpus}", f"out={out}", "--nproc", str(ranks)]
    assert main([*BASE, *words, *launch]) == 0
    return [record["loss"] for record in read_json_lines(out / METRICS)]


@pytest.fixture(scope="module")
def in_32_bits(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(corpus, tmp_path_factory.mktemp("fp32"), "precision.dtype=fp32")


@pytest.mark.parametrize("run", RUNS)
def test_a_run_in_sixteen_bits_ends_as_one_in_thirty_two(
    run: str, corpus: str, in_32_bits: list[float], tmp_path: Path
) -> None:
    ours = losses(corpus, tmp_path, *RUNS[run])
    assert in_32_bits[-1] < 0.7 * in_32_bits[0]
    assert len(ours) == len(in_32_bits) == 40
    assert ours[-1] == pytest.approx(in_32_bits[-1], rel=0.01)


@pytest.fixture(scope="module")
def in_bf16(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(corpus, tmp_path_factory.mktemp("bf16"), "precision.dtype=bf16")


@pytest.mark.parametrize("recipe", ["current", "delayed", "block"])
def test_a_run_in_eight_bits_ends_as_one_in_sixteen(
    recipe: str, corpus: str, in_bf16: list[float], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ours = losses(corpus, tmp_path, "precision.dtype=bf16", f"precision.fp8={recipe}", "log.statistics_every=20")
    assert in_bf16[-1] < 0.7 * in_bf16[0]
    assert ours != in_bf16 and len(ours) == 40
    assert ours[-1] == pytest.approx(in_bf16[-1], rel=0.01)
    said = capfd.readouterr().out
    assert f"linear (fp8 {recipe}, " in said and f"fp8      {recipe} scaling, E4M3" in said
    (*_, last) = read_json_lines(tmp_path / METRICS)
    assert len(last["statistics"]["fp8_snr_db"]) == 2 * 4 * 3
    assert min(last["statistics"]["fp8_snr_db"].values()) > 15
