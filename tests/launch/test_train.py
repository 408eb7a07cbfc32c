"""The command line of `megacore train`: what is refused, what a dry run says, and who speaks in a job."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.data.indexed import IndexedWriter
from megacore.exits import STOPPED, run
from megacore.launch.train import as_rank, main
from megacore.mesh.rank_info import RankInfo

DRY = """
import sys
import time
from megacore.exits import run
code = run("megacore.launch.train", sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.fixture
def data(tmp_path: Path) -> str:
    prefix = str(tmp_path / "corpus")
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(10):
            writer.add_document(np.arange(100))
    return prefix


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is rank 1 of 2 that torchrun started."""
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")


def words(data: str, out: Path, *more: str) -> list[str]:
    return ["--preset", "demo", f"data.blend={data}", f"out={out}", "train.seq_len=16", *more]


@pytest.mark.parametrize("nproc", [0, -2])
def test_no_process_is_refused(nproc: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("megacore.launch.train", ["--preset", "demo", f"--nproc={nproc}"]) == 2
    assert capsys.readouterr().err.startswith(f"megacore: --nproc={nproc} must be at least 1")


def test_a_dry_run_prints_a_run_file(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("parallel.tp=2", "train.batch_ramp=8,8,100", "train.steps=20", "train.eval_every=5", "data.split=8,2,0")
    arguments = words(data, tmp_path / "run", *more, "--nproc", "2", "--dry-run")
    assert run("megacore.launch.train", arguments) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    head = shown.out.partition("\n\n")[0].splitlines()
    assert [line.split()[1] for line in head[:6]] == ["model", "layout", "batch", "data", "state", "built"]
    # 2 * 4096 * 128 embeddings; 4 * (4 * 128^2 + 3 * 128 * 384) + 9 * 128 the rest
    assert "1.90M parameters" in head[0]
    assert "2 processes" in head[1]
    assert "16 x 16 tokens (grown from 8 by step" in head[2]
    assert "800 training tokens in corpus: " in head[3]
    (tmp_path / "again.toml").write_text(shown.out)
    own = [word for word in arguments if "=" in word]
    assert load(str(tmp_path / "again.toml")) == resolve(load(None, own, "demo"), 2)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_a_large_world_needs_neither_ranks_nor_data(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "demo", "model.vocab_size=4096", "parallel.tp=2", "parallel.pp=2", "parallel.zero=1"]
    more = ["train.global_batch_size=512", "train.micro_batch_size=1", "--nproc", "1024", "--dry-run"]
    assert run("megacore.launch.train", [*words, *more, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["world"], found["layout"]["dp"], found["microbatches"]) == (1024, 256, 2)
    for rank in found["ranks"]:
        assert rank["agrees"]
        assert rank["stands_for"] == 512
        gaps = sum(rank[kind] - rank["spec"][kind] for kind in ("params", "grads", "optimizer"))
        assert gaps == rank["gaps"] >= 0
        assert {each["axis"] for each in rank["communication"]} >= {"tp", "pp", "dp_shard"}
    assert run("megacore.launch.train", [*words, *more]) == 0
    shown = capsys.readouterr().out
    assert "# data     none yet: data.blend is empty" in shown
    assert "# built    2 of 1024 ranks, with kernels for cpu:\n" in shown
    assert run("megacore.launch.train", ["--preset", "demo", "--json"]) == 2
    assert "--json goes with --dry-run" in capsys.readouterr().err


def test_a_dry_run_shows_the_pipeline(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = ("parallel.pp=2", "parallel.schedule=zb-v", "train.micro_batch_size=2")
    assert run("megacore.launch.train", words(data, tmp_path / "run", *pipeline, "--dry-run")) == 0
    shown = capsys.readouterr().out
    assert "# stages   0: embedding + layer 0; 1: layers 1-2; 2: layer 3; 3: head\n" in shown
    assert "# schedule zb-v: 2 ranks, 4 stages, 8 microbatches; bubble " in shown
    assert "\nchunks = 2\n" in shown


def test_a_wrong_schedule_of_ones_own_is_refused_before_anything_starts(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(
        "0: F0.0 F0.1 F0.2 F0.3 B0.1 B0.0 B0.2 B0.3\n1: F1.0 B1.0 F1.1 B1.1 F1.2 B1.2 F1.3 B1.3", encoding="utf-8"
    )
    more = ("parallel.pp=2", f"parallel.schedule={path}")
    assert run("megacore.launch.train", words(data, tmp_path / "run", *more)) == 2
    assert capsys.readouterr().err.startswith(f"megacore: parallel.schedule={path}: rank 0, position ")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_finds_what_is_wrong_with_the_data(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("megacore.launch.train", words(data, tmp_path, "--dry-run", "data.blend=nothing")) == 2
    assert "nothing" in capsys.readouterr().err


@pytest.mark.usefixtures("job")
def test_the_first_rank_of_a_machine_speaks_of_wrong_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = ["--preset", "demo", "train.steps=0"]
    assert run("megacore.launch.train", bad) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run("megacore.launch.train", bad) == 2
    assert "train.steps=0" in capsys.readouterr().err


@pytest.mark.usefixtures("job")
def test_one_rank_of_a_job_starts_no_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run("megacore.launch.train", ["--preset", "demo", "--nproc=1", "--dry-run"]) == 2
    assert "--nproc=1 starts processes, but this one is already rank 1 of a job" in capsys.readouterr().err


def test_who_lost_a_peer_leaves_the_cause_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    info = RankInfo(1, 2, 1, 2, "env://")
    target = "tests.launch.targets:fail_with"
    assert as_rank(target, info, (RuntimeError("Connection closed by peer"),)) == 1
    assert capsys.readouterr().err == "megacore: rank 1 of 2 ends because another one has\n"
    assert as_rank(target, info, (KeyError("the cause"),)) == 1
    shown = capsys.readouterr().err
    assert "rank 1 of 2 failed: KeyError" in shown
    assert "in fail_with" in shown
    assert "Traceback" not in shown
    assert as_rank("tests.launch.targets:leave_with", info, ([0, 75],)) == 75


def test_a_run_without_data_is_told_with_all_else_and_at_once() -> None:
    arguments = ["--preset", "demo", "parallel.tp=3", "train.steps=0"]
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", DRY, *arguments], capture_output=True, text=True, timeout=60)
    seconds = time.monotonic() - started
    assert done.returncode == 2
    for told in ("problems:", "data.blend is empty", "parallel.tp=3 does not divide", "train.steps=0"):
        assert told in done.stderr
    bare = time.monotonic()
    subprocess.run([sys.executable, "-c", "import numpy"], check=True, timeout=60)
    assert seconds < max(1.0, 10 * (time.monotonic() - bare))  # more only where the machine is that slow


def test_what_the_data_lacks_is_told_before_anything_starts(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("log.sample_every=5", "log.sample_prompts=['a']", "train.eval_every=5", "data.fim_rate=0.5")
    assert run("megacore.launch.train", words(data, tmp_path / "run", *more, "--nproc", "2")) == 2
    told = capsys.readouterr().err
    for words_told in (
        "3 problems:",
        "log.sample_every=5 needs",
        "data.fim_rate=0.5 needs",
        "gives valid none of the 10",
    ):
        assert words_told in told
    assert not (tmp_path / "run").exists()


def test_patterns_without_parameters_are_told_before_anything_starts(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megacore.config.supported.WORKS", {})
    freeze = 'optim.freeze=["layers.*.attention.qvk.weight"]'
    assert run("megacore.launch.train", words(data, tmp_path, "--dry-run", freeze)) == 2
    told = capsys.readouterr().err
    assert "optim.freeze holds" in told
    assert "did you mean layers.*.attention.qkv.weight?" in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_asked_to_stop_before_ranks_run(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is lost: it leaves as one that has saved. A wish to save has nothing to do."""
    before = signal.getsignal(number)

    def ask(*rest: object) -> int:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        return 0

    monkeypatch.setattr("megacore.launch.train.begun", ask)
    saves = number == signal.SIGUSR2
    assert main(["--preset", "demo"]) == (0 if saves else STOPPED)
    assert ("the same command goes on" in capsys.readouterr().err) != saves
    assert signal.getsignal(number) == before
