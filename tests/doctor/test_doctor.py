"""The doctor's report: what it finds here, and whom it blames when something is made bad."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megacore.doctor import gpus, machine, packages
from megacore.doctor.finding import FAIL, OK, WARN, Finding, examined, worst
from megacore.doctor.ranks import Speeds, judge, rounds
from megacore.doctor.training import cause_in, trains
from megacore.launch.doctor import lines, main
from megacore.launch.places import meeting_point
from tests.train.runs import words_of, write_corpus


def test_the_report_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--json", "--out", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    checks = {each["name"]: each for each in report["checks"]}
    assert {"python", "torch", "packages", "cuda", "csrc/cpu", "g++", "cores", "disk space", "matplotlib"} <= set(
        checks
    )
    assert report["status"] in (OK, WARN) and checks["torch"]["status"] == OK
    assert "disk speed" not in checks, "looking measures nothing"
    assert all(set(each) == {"name", "status", "detail", "fix"} for each in report["checks"])


@pytest.mark.parametrize("number", range(1, 10))
def test_every_pair_meets_once_and_nobody_twice_in_a_round(number: int) -> None:
    met = []
    for pairs in rounds(number):
        busy = [rank for pair in pairs for rank in pair]
        assert len(set(busy)) == len(busy) and max(busy, default=0) < number
        met += pairs
    assert sorted(met) == [(a, b) for a in range(number) for b in range(a + 1, number)]


def job(num_nodes: int = 4, per_node: int = 2) -> list[Speeds]:
    """A job in which everything is as it should be."""
    number = num_nodes * per_node
    hosts = [f"node{rank // per_node}" for rank in range(number)]
    pairs = [{b: 200.0 if hosts[a] == hosts[b] else 25.0 for b in range(number) if b != a} for a in range(number)]
    return [Speeds(hosts[rank], 600.0, 0.0, pairs[rank], dict.fromkeys(pairs[rank], 9.0)) for rank in range(number)]


def told(ranks: list[Speeds]) -> list[tuple[str, str]]:
    return [(each.name, each.detail) for each in judge(ranks) if each.status != OK]


def test_a_good_job() -> None:
    assert told(job()) == []
    assert [each.name for each in judge(job())] == ["computing", "wires within nodes", "wires between nodes"]


def test_the_slow_rank_is_named() -> None:
    ranks = job()
    ranks[5] = replace(ranks[5], tflops=300.0)
    assert told(ranks) == [("slow rank", "rank 5 on node2 computes at 50% of the median")]


def test_the_bad_wire_is_named() -> None:
    """All that a node's rank says to other nodes is slow; and one pair alone."""
    ranks = job()
    for other in range(8):
        if other not in (6, 7):
            ranks[6].bandwidth[other] = ranks[other].bandwidth[6] = 5.0
    ranks[0].bandwidth[2] = 4.0
    found = told(ranks)
    assert found[0] == ("slow wire", "rank 6 on node3 is slow with most of its partners between nodes")
    assert found[1:] == [("slow wire", "ranks 0 (node0) and 2 (node1): 4 GB/s")]


def test_clocks_apart() -> None:
    ranks = job()
    ranks[3] = replace(ranks[3], clock=2.5)
    assert told(ranks) == [("clocks", "node0 and node1 are 2.5 s apart")]


def test_a_check_that_breaks_is_told() -> None:
    def check() -> Iterator[Finding]:
        yield Finding("first", OK, "fine")
        raise KeyError("what")

    def asks_for_too_much() -> Iterator[Finding]:
        yield from ()
        meeting_point("host:port")

    (found_wrong,) = examined("third", asks_for_too_much)
    assert found_wrong.status == FAIL and found_wrong.detail.startswith("--meet=host:port must be")
    found = list(examined("second", check))
    assert [each.status for each in found] == [OK, WARN] and "KeyError: 'what'" in found[1].detail
    assert worst(found) == WARN and worst([]) == OK and worst([*found, Finding("x", FAIL, "")]) == FAIL


def test_the_apex_of_the_index_is_unmasked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(packages.impostor()) == []
    monkeypatch.setattr(packages, "version_of", lambda name: "0.9.10.dev0")
    (found,) = packages.impostor()
    assert found.status == WARN and found.fix == "pip uninstall apex"


def test_small_shared_memory_and_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(total=64 << 20, free=1 << 20))
    (found,) = machine.shared_memory()
    assert found.status == WARN and "--shm-size" in found.fix
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (256, 256))
    found = next(machine.limits())
    assert found.status == WARN and "ulimit -n" in found.fix


def test_where_runs_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking alone measures no speed, and still finds what cannot be written; a full disk is tried, too."""
    monkeypatch.setattr(machine, "PROBE_BLOCK", 1 << 10)
    assert [each.name for each in machine.disk(tmp_path / "not" / "there", 0)] == ["disk space"]
    _, speed = machine.disk(tmp_path, 4 << 10)
    assert speed.name == "disk speed" and str(tmp_path) in speed.detail
    for num_bytes in (0, 4 << 10):
        *_, locked = machine.disk(Path("/proc"), num_bytes)
        assert locked.status == FAIL and "/proc cannot be written" in locked.detail and locked.fix


def test_the_cause_of_a_run_that_broke_is_a_line() -> None:
    box = "╭─ rank 1 of 2 failed: RuntimeError ──╮\n│ cannot find  │\n│ address for: lo │\n│ a.py:1 in b │\n│ c │\n╰──╯"
    assert cause_in(f"start\n{box}\n") == "rank 1 of 2 failed: RuntimeError cannot find address for: lo a.py:1 in b"
    assert cause_in("a\nmegacore: no such key\n") == "a megacore: no such key"


def test_ports_of_infiniband(tmp_path: Path) -> None:
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state + "\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    good, bad = gpus.infiniband(tmp_path)
    assert (good.status, good.detail) == (OK, "mlx5_0 port 1: 4: ACTIVE, 400 Gb/sec (4X NDR)")
    assert bad.status == WARN and "ibstat" in bad.fix


class Nvml:
    """As pynvml, of GPUs with the given facts."""

    NVMLError = RuntimeError
    NVML_TEMPERATURE_GPU = NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = 0

    def __init__(self, heat: int = 35, reasons: int = 0, errors: int = 0, others: tuple[int, ...] = ()) -> None:
        self.nvmlDeviceGetHandleByIndex = lambda number: number
        self.nvmlDeviceGetComputeRunningProcesses = lambda handle: [SimpleNamespace(pid=pid) for pid in others]
        self.nvmlDeviceGetTemperature = lambda handle, kind: heat
        self.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: reasons
        self.nvmlDeviceGetTotalEccErrors = lambda handle, kind, counter: errors


def test_what_nvml_says() -> None:
    assert [each.status for each in gpus.of_gpu(Nvml(), 3)] == [OK]
    bad = list(gpus.of_gpu(Nvml(heat=90, reasons=0x28, errors=2, others=(17,)), 3))
    assert [each.status for each in bad] == [WARN, WARN, FAIL, FAIL]
    assert "17" in bad[0].detail and "hardware slowdown, hot" in bad[2].detail and "2 uncorrected" in bad[3].detail


def test_the_names_that_nvml_is_asked_for_exist() -> None:
    pynvml = pytest.importorskip("pynvml")
    for name in vars(Nvml()):
        assert hasattr(pynvml, name), name
    for name in ("NVML_TEMPERATURE_GPU", "NVML_MEMORY_ERROR_TYPE_UNCORRECTED", "NVML_VOLATILE_ECC", "NVMLError"):
        assert hasattr(pynvml, name), name


def test_a_page_for_people() -> None:
    found = [Finding("torch", OK, "2.13"), Finding("disk", FAIL, "full", "rm"), Finding("tiktoken", OK, "not", "pip")]
    text = "\n".join(lines(found, colour=False))
    assert "FAIL  disk      full" in text and "→ rm" in text and "2 ok, 1 FAIL" in text
    assert text.endswith("could be added:\n  tiktoken  pip")
    assert "\x1b[31mFAIL" in "\n".join(lines(found, colour=True))


@pytest.mark.slow
def test_a_preflight_that_fails_ends_the_job_with_the_reason(tmp_path: Path) -> None:
    letters = write_corpus(str(tmp_path / "letters"), 1)
    words = words_of(letters, Path("/proc/run"), "parallel.tp=2")
    command = [sys.executable, "-m", "megacore.launch.node", "--preflight", "--nproc", "2", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1 and "FAIL" in done.stdout and "disk: /proc cannot be written" in done.stderr, done
    assert "rank 0 of 2 failed: pre-flight" in done.stderr and "--exclude=NODE" in done.stderr


@pytest.mark.slow
def test_everything_with_measuring(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megacore", "doctor", "--json", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    checks = {each["name"]: each for each in json.loads(done.stdout)["checks"]}
    assert checks["training"]["status"] == OK and "twice the same bits" in checks["training"]["detail"]
    assert "GB/s" in checks["wires within nodes"]["detail"] and "disk speed" in checks


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [3, 4])
def test_training_on_any_number_of_ranks(nproc: int, tmp_path: Path) -> None:
    (found,) = trains(tmp_path, nproc, "cpu")
    assert found.status == OK, found.detail


@pytest.mark.slow
def test_a_preflight_inside_a_job(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "megacore", "doctor"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = ["--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stdout and "wires within nodes" in done.stdout and done.stdout.count("nodes  ") == 2
