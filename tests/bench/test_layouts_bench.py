"""`megacore bench layouts`: what is tried, how a sweep goes on, what becomes of failures, and how rankings compare."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megacore.bench.layout_trials import (
    WARMUP,
    How,
    Record,
    Results,
    Trial,
    as_timed,
    key_of,
    run_trial,
    sweep,
    trials_of,
    why,
)
from megacore.bench.layouts import collect, compare, kendall_tau, made_up_data, table
from megacore.bench.layouts_command import write
from megacore.config.errors import ConfigError
from megacore.config.load import load
from megacore.config.schema import RunConfig
from megacore.data.indexed import IndexedDataset
from megacore.exits import run as run_command

RUN = ("model.vocab_size=512", "train.global_batch_size=8", "train.micro_batch_size=1", "data.blend=unused")


def small() -> RunConfig:
    return as_timed(load(None, RUN, "demo"), steps=3)


def texts(trials: list[Trial]) -> list[str]:
    return [trial.text for trial in trials]


def test_named_layouts_are_tried_once_each_and_legal_ones_by_default() -> None:
    named = trials_of(small(), "tp=2,pp=2;tp=1;dp=2,zero=1;pp=2,tp=2", "sizes", 4)
    assert texts(named) == ["tp=1", "dp=2,zero=1", "tp=2,pp=2"]
    assert [trial.num_ranks for trial in named] == [1, 2, 4]
    sizes = trials_of(small(), None, "sizes", 4)
    assert texts(sizes) == [
        "tp=1",
        "dp=2",
        "pp=2",
        "tp=2",
        "pp=3",
        "dp=4",
        "pp=2,dp=2",
        "pp=4",
        "tp=2,dp=2",
        "tp=2,pp=2",
        "tp=4",
    ]
    pairs = trials_of(small(), None, "pairs", 2)
    assert set(texts(pairs)) < set(texts(trials_of(small(), None, "all", 2)))
    with pytest.raises(ConfigError, match=r"layout tp=3: parallel.tp=3 does not divide"):
        trials_of(small(), "tp=3;dp=2", "sizes", 4)


class Machine:
    """Runs nothing: times and failures by layout; stops the sweep after so many."""

    def __init__(self, seconds: dict[str, float], stop_after: int = 10**6) -> None:
        self.seconds, self.stop_after = seconds, stop_after
        self.ran: list[tuple[str, int]] = []

    def __call__(self, trial: Trial, number: int) -> Record:
        if len(self.ran) == self.stop_after:
            raise KeyboardInterrupt
        self.ran.append((trial.text, number))
        seconds = self.seconds.get(trial.text)
        if seconds is None:
            return Record(trial.text, number, "oom", "CUDA out of memory")
        return Record(trial.text, number, "ok", "", (seconds, seconds + 1, seconds + 10.0 * number), 1.5, 9.0)


def test_a_sweep_goes_on_where_it_was_interrupted_and_leaves_out_what_failed(tmp_path: Path) -> None:
    trials, path = trials_of(small(), "tp=1;tp=2;pp=2;dp=4", "sizes", 4), tmp_path / "layouts.jsonl"
    first = Machine({"tp=1": 1.0, "pp=2": 2.0, "dp=4": 4.0}, stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        sweep(trials, 3, Results(path, "key", {}), first, lambda text: None)
    with path.open("a") as file:
        file.write('{"layout": "pp=2", "rou')  # it was killed while it wrote
    second = Machine(first.seconds)
    said: list[str] = []
    sweep(trials, 3, Results(path, "key", {}), second, said.append)
    both = first.ran + second.ran
    assert len(both) == len(set(both)), "nothing is run twice"
    assert sorted(both) == sorted([("tp=2", 0), *((text, n) for text in ("tp=1", "pp=2", "dp=4") for n in range(3))])
    assert [text for text, number in both if number == 0] != [text for text, number in both if number == 1]
    results = Results(path, "key", {})
    assert len(results.records) == 10
    found = collect(trials, results, {})
    assert [(one.trial.text, one.status, one.median) for one in found] == [
        ("tp=1", "ok", 2.0),
        ("pp=2", "ok", 3.0),
        ("dp=4", "ok", 5.0),
        ("tp=2", "oom", None),
    ]
    with pytest.raises(ValueError, match="holds the results of another run"):
        Results(path, "other", {})


def test_results_do_not_depend_on_layout_and_folder_but_on_all_else() -> None:
    run = small()
    assert key_of(run) == key_of(replace(run, out="elsewhere", parallel=replace(run.parallel, tp=2)))
    assert key_of(run) != key_of(replace(run, train=replace(run.train, seq_len=64)))


@pytest.mark.parametrize(
    ("code", "said", "status", "reason"),
    [
        (None, "", "timeout", "not done after 7 s"),
        (-9, "", "oom", "killed, as the kernel does without memory"),
        (
            1,
            "│ torch.OutOfMemoryError: CUDA out of memory. │\nrank 1 ends",
            "oom",
            "torch.OutOfMemoryError: CUDA out of memory.",
        ),
        (2, "megacore: parallel.tp=3 does not divide\n", "refused", "megacore: parallel.tp=3 does not divide"),
        (1, "box\n╰──\nRuntimeError: no\n", "failed", "exit code 1: RuntimeError: no"),
        (75, "", "failed", "it was told to stop"),
    ],
)
def test_what_ended_a_trial_is_told(code: int | None, said: str, status: str, reason: str) -> None:
    assert why(code, said, 7.0) == (status, reason)


STEPS = """
import json, pathlib, sys, time
out = pathlib.Path(sys.argv[2]).parent
time.sleep(float(SLEEP))
lines = [{"step": n, "step_time_s": 0.1 * n, "memory_gb": n} for n in range(1, 6)]
(out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


@pytest.mark.parametrize(("sleep", "status"), [(0.0, "ok"), (60.0, "timeout")])
def test_a_trial_is_a_command_whose_metrics_are_read(tmp_path: Path, sleep: float, status: str) -> None:
    script = tmp_path / "job.py"
    script.write_text(STEPS.replace("SLEEP", str(sleep)))
    (trial,) = trials_of(small(), "dp=2", "sizes", 4)
    how = How(tmp_path, 3, 20.0 if status == "ok" else 0.5, f"{sys.executable} {script}")
    record = run_trial(how, trial, 0)
    assert record.status == status
    assert record.seconds == ((0.1 * 3, 0.1 * 4, 0.5) if status == "ok" else ())
    assert record.memory_gb == (5 if status == "ok" else None)
    assert record.wall_s < 10
    assert load(str(tmp_path / "runs" / "dp2.0" / "run.toml")).train.steps == 3 + WARMUP
    words = How(tmp_path, 3, 9.0, "srun -n {nproc} python -m megacore").command(trial, Path("run.toml"))
    assert words == ["srun", "-n", "2", "python", "-m", "megacore", "train", "run.toml"]


def test_rankings_are_compared_as_kendall_did() -> None:
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3))  # one tie: tau-b
    assert kendall_tau([1], [1]) is None
    assert kendall_tau([1, 1], [1, 2]) is None


def test_predictions_stand_beside_measurements(tmp_path: Path) -> None:
    trials = trials_of(small(), "tp=1;tp=2;pp=2;dp=4", "sizes", 4)
    results = Results(tmp_path / "layouts.jsonl", "key", {})
    sweep(trials, 2, results, Machine({"tp=1": 1.0, "pp=2": 2.0, "dp=4": 4.0}), lambda text: None)
    found = collect(trials, results, {"tp=1": 3.0, "pp=2": 1.0, "dp=4": 9.0, "tp=2": 1.0})
    ranking = compare(found)
    assert ranking is not None
    assert ranking.tau == pytest.approx(1 / 3)  # tp=1 and pp=2 are the other way round
    assert ranking.tau_of_halves == 1
    assert ranking.best_by_plan == "pp2"
    assert ranking.loss == pytest.approx(found[1].median / found[0].median - 1)  # type: ignore[operator]
    shown = table(found)
    assert "oom: CUDA out of memory" in shown
    assert "Kendall tau 0.33" in shown
    paths = write(tmp_path, found, {"machine": {}})
    assert [path.name for path in paths][:2] == ["layouts.json", "layouts.csv"]
    assert all(path.stat().st_size for path in paths)
    told = json.loads(paths[0].read_text())
    assert told["ranking"]["tau"] == ranking.tau
    assert len(paths[1].read_text().splitlines()) == 1 + len(trials)


def test_tokens_are_made_up_where_there_are_none(tmp_path: Path) -> None:
    run = small()
    prefix = made_up_data(run, tmp_path, run.train.steps)
    needed = run.train.steps * run.train.global_batch_size * (run.train.seq_len + 1)
    assert IndexedDataset(prefix).num_tokens >= needed
    assert made_up_data(run, tmp_path, run.train.steps) == prefix
    with pytest.raises(ValueError, match="vocab_size=0"):
        made_up_data(replace(run, model=replace(run.model, vocab_size=0)), tmp_path / "new", 3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "needs a run file or --preset NAME"),
        (("--preset", "demo", "--rounds", "0"), "--rounds=0 must be at least 1"),
        (("--preset", "demo", "--limit", "0"), "--limit=0 must be more than 0"),
        (("--preset", "demo", "--launcher", "srun"), "does not say where the number of ranks goes"),
        (("--preset", "demo", "--layouts", "tp=3"), "layout tp=3: parallel.tp=3 does not divide"),
    ],
)
def test_wrong_input_is_told_before_anything_runs(
    words: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("megacore.tools.bench", ["layouts", *words, "--output", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out" / "layouts.jsonl").exists()


@pytest.mark.slow
def test_layouts_are_trained_for_real_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    words = ["layouts", "--preset", "demo", "model.vocab_size=512", "train.global_batch_size=4", "train.seq_len=32"]
    more = ["train.micro_batch_size=2", "--layouts", "tp=1;dp=2", "--rounds", "1", "--steps", "2", "--output", str(out)]
    assert run_command("megacore.tools.bench", [*words, *more, "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("round 1 of 1") == 2
    found = json.loads(shown.out)["layouts"]
    assert {one["layout"]: one["status"] for one in found} == {"tp=1": "ok", "dp=2": "ok"}
    assert all(one["median_s"] > 0 and one["memory_gb"] > 0 for one in found)
    assert run_command("megacore.tools.bench", [*words, *more]) == 0
    assert capsys.readouterr().err == "", "nothing is run again"
