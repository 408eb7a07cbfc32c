"""metrics.jsonl and events.jsonl: the keys of the contract, full precision, and files that outlive a crash."""

import json
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacore.monitor.jsonl import JsonLines, finite, read_json_lines
from megacore.monitor.memory import peak_memory_gb, peak_resident_bytes
from megacore.monitor.metrics import EventsWriter, MetricsWriter, StepMetrics, format_line
from megacore.monitor.run_folder import archive_previous_run

KEYS = [
    "step",
    "loss",
    "grad_norm",
    "lr",
    "tokens",
    "tokens_per_s",
    "step_time_s",
    "tflops_per_device",
    "mfu",
    "memory_gb",
    "skipped",
]


def metrics(step=1, **changes):
    known = {"loss": 0.1 + 0.2, "grad_norm": 1 / 3, "lr": 3e-4, "tokens": 2048}
    known |= {"tokens_per_s": 11234.5, "step_time_s": 0.18, "memory_gb": 0.62}
    return StepMetrics(**{"step": step, **known, **changes})


def strict_json(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_record_goes_through_strict_json_and_back():
    odd = metrics(3, grad_norm=math.inf, mfu=None, skipped=True, statistics={"norm": {"mlp": -math.inf, "head": 2.0}})
    text = json.dumps(finite(odd.record()) | {"of_a_later_version": 1}, allow_nan=False)
    record = strict_json(text)
    assert StepMetrics.of(record) == odd and StepMetrics.of(record) == odd, "what it is made from stays as it is"


def test_keys_and_their_order(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(metrics(1))
    writer.write(metrics(2, val_loss=4.5))
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert list(strict_json(first)) == KEYS
    assert list(strict_json(second)) == [*KEYS, "val_loss"]
    assert strict_json(first)["mfu"] is None
    assert strict_json(first)["skipped"] is False
    assert '"loss": 0.30000000000000004' in first


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_any_float_comes_back_exactly(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("run")
    MetricsWriter(folder).write(metrics(loss=value))
    strict_json((folder / "metrics.jsonl").read_text())
    (record,) = read_json_lines(folder / "metrics.jsonl")
    assert record["loss"] == value or (math.isnan(value) and math.isnan(record["loss"]))


def test_a_diverged_step_is_valid_json_and_says_what_happened():
    assert finite({"step": 3, "loss": math.nan, "grad_norm": -math.inf, "mfu": None}) == {
        "step": 3, "loss": None, "grad_norm": None, "mfu": None, "nonfinite": {"loss": "nan", "grad_norm": "-inf"},
    }  # fmt: skip


def test_statistics_of_a_diverged_step_come_back_too(tmp_path):
    statistics = {"gradient_norm": {"mlp": math.inf, "head": 1.5}, "zero_fraction": 0.25}
    writer = MetricsWriter(tmp_path)
    writer.write(metrics(1, loss=math.inf, statistics=statistics))
    writer.write(metrics(2))
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    written = strict_json(first)
    assert list(written) == [*KEYS, "statistics", "nonfinite"]
    assert written["statistics"] == {"gradient_norm": {"mlp": None, "head": 1.5}, "zero_fraction": 0.25}
    assert written["nonfinite"] == {"loss": "inf", "statistics.gradient_norm.mlp": "inf"}
    assert list(strict_json(second)) == KEYS
    record, _ = read_json_lines(tmp_path / "metrics.jsonl")
    assert (record["loss"], record["statistics"]) == (math.inf, statistics)
    assert statistics["gradient_norm"]["mlp"] == math.inf  # what was given is left as it was


@pytest.mark.parametrize(
    ("tail", "kept"), [(b'{"step": 2, "lo', [1]), (b'{"step": 2}', [1, 2]), (b'{"step": 2}\n', [1, 2]), (b"", [1])]
)
def test_a_cut_last_line_is_repaired_on_reopening(tmp_path, tail, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + tail)
    assert [record["step"] for record in read_json_lines(path)] == kept
    lines = JsonLines(path)
    lines.append({"step": 9})
    lines.close()
    assert [strict_json(line)["step"] for line in path.read_text().splitlines()] == [*kept, 9]


def test_a_file_that_is_one_cut_line_becomes_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"st')
    JsonLines(path).close()
    assert path.read_bytes() == b""


def test_a_bad_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_json_lines(path)


def test_every_line_is_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 4):
        writer.write(metrics(step))
        assert len(read_json_lines(tmp_path / "metrics.jsonl")) == step


def test_events(tmp_path):
    writer = EventsWriter(tmp_path)
    writer.write("sample", step=10, text="中文\n")
    (event,) = read_json_lines(tmp_path / "events.jsonl")
    assert list(event) == ["time", "event", "step", "text"]
    assert event["text"] == "中文\n"
    assert event["time"] > 1.6e9


def test_line_shows_what_is_known():
    line = format_line(metrics(7, mfu=0.412, tflops_per_device=0.365, val_loss=4.5, skipped=True), 600, eta_s=125)
    for part in """step   7/600|loss  0.3000|lr 3.00e-04|grad  0.333|11.2k tok/s|0.365 TFLOP/s|mfu 41.2%|0.62 GB
                   eta  2m05s|val 4.5000|skipped""".replace("\n", "|").split("|"):
        assert part.strip() in line
    bare = format_line(StepMetrics(1, 2.0, None, 1e-3, 10), 5)
    assert bare == "step 1/5  loss  2.0000  lr 1.00e-03"


def test_lines_of_one_run_align():
    early = format_line(metrics(1, loss=8.3, tokens_per_s=950.0), 600, eta_s=299)
    late = format_line(metrics(600, loss=4.1, grad_norm=12.5, tokens_per_s=112340.0), 600, eta_s=3)
    assert [early.index(word) for word in ("loss", "lr", "grad", "tok/s", "eta")] == [
        late.index(word) for word in ("loss", "lr", "grad", "tok/s", "eta")
    ]
    assert "nan" in format_line(metrics(loss=math.nan, grad_norm=math.inf), 600)


def test_an_earlier_run_is_moved_aside_whole(tmp_path):
    names = ["metrics.jsonl", "events.jsonl", "log.txt", "config.toml", "loss.png", "tensorboard/events.1"]
    keep = ["checkpoints/step-00000100/a.safetensors", "run.toml", "data/text.bin", "data/figure.png"]
    for name in names + keep:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert archive_previous_run(tmp_path) == tmp_path / "previous" / "1"
    assert all((tmp_path / "previous" / "1" / name).read_text() == name for name in names)
    assert not any((tmp_path / name).exists() for name in names)
    assert all((tmp_path / name).exists() for name in keep)
    (tmp_path / "log.txt").write_text("again")
    assert archive_previous_run(tmp_path) == tmp_path / "previous" / "2"
    assert archive_previous_run(tmp_path) is None


def test_peak_memory(tmp_path):
    assert peak_memory_gb(2_500_000_000) == 2.5
    assert 0.005 < peak_memory_gb() < 100
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t  1000 kB\n")
    assert peak_resident_bytes(status) == 1_024_000


@pytest.mark.skipif(sys.platform != "linux", reason="compares Linux' two sources")
def test_peak_memory_without_proc(tmp_path):
    assert peak_resident_bytes(tmp_path / "none") >= 0.9 * peak_resident_bytes()
