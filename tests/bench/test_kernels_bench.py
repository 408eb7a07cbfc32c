"""`megacore bench kernels` times what the table has, and reckons bytes, FLOPs and shares."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megacore.bench import kernels, kernels_report
from megacore.bench.harness import comparison
from megacore.bench.kernels import BOTH, COMPILED, COPY, FORWARD, Measured, Size, measure, peak_of, sizes
from megacore.kernels.operations import OPERATIONS, cast, tensors_of, work_of
from megacore.kernels.table import TABLE
from megacore.tools import bench

CPU = torch.device("cpu")
TINY = ("--tokens", "16", "--hidden", "128", "--rounds", "2", "--device", "cpu", "--no-compile")


def test_cases_are_shown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("--case", "rms_norm", "--case", "linear", "--case", "adamw")
    assert bench.main(["kernels", *TINY, *names, "--json", "--output", str(tmp_path)]) == 0
    shown = json.loads(capsys.readouterr().out)
    # of AdamW there is one in fp32 only
    assert [(case["operation"], case["pass"], case["settings"]["dtype"]) for case in shown["cases"]] == [
        ("rms_norm", FORWARD, "float32"),
        ("rms_norm", BOTH, "float32"),
        ("linear", FORWARD, "float32"),
        ("adamw", FORWARD, "float32"),
        ("rms_norm", FORWARD, "bfloat16"),
        ("rms_norm", BOTH, "bfloat16"),
        ("linear", FORWARD, "bfloat16"),
    ]
    for case in shown["cases"]:
        dtype = getattr(torch, case["settings"]["dtype"])
        willing = {k.backend for k in TABLE if k.operation == case["operation"] and not k.refuses(CPU, dtype)}
        assert {row["side"] for row in case["sides"]} == willing | {COPY}
        assert all(row["median_s"] > 0 and row["gb_per_s"] > 0 for row in case["sides"])
        assert case["copy_gb_per_s"] > 0 and case["peak_gflop_per_s"] > 0
    assert json.loads((tmp_path / "kernels.json").read_text()) == shown
    rows = list(csv.DictReader((tmp_path / "kernels.csv").open()))
    assert len(rows) == sum(len(case["sides"]) for case in shown["cases"])
    pytest.importorskip("matplotlib")
    picture = (tmp_path / "kernels.svg").read_text()
    assert picture.startswith("<?xml") and "FLOPs per byte" in picture


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_can_be_timed(name: str) -> None:
    found = list(measure(name, Size(16, 128, torch.float32, CPU), rounds=1, peak=1e9, compiles=False))
    assert [one.step for one in found] == ([FORWARD, BOTH] if OPERATIONS[name].with_grad else [FORWARD])
    moves = name in ("permute", "unpermute")  # which compute nothing
    assert all(one.num_bytes > 0 and (one.flops > 0 or moves) for one in found)


def test_bytes_and_flops_are_those_of_an_operation_that_moves_nothing_twice() -> None:
    def work(name: str, t: int, h: int) -> tuple[float, ...]:
        operation = OPERATIONS[name]
        args = cast(operation.sample(t, h), torch.float32)
        found = work_of(operation, args, tensors_of(operation.call(operation.reference, *args)))
        return found.forward_bytes, found.backward_bytes, found.forward_flops, found.backward_flops

    t, h = 6, 128
    assert work("swiglu", t, h)[:2] == (4 * 3 * t * h, 4 * 5 * t * h)  # gate, up, y; gate, up, dy, dgate, dup
    assert work("rms_norm", t, h)[:2] == (4 * (2 * t * h + h), 4 * (3 * t * h + 2 * h))
    angles = 2 * t * 64
    assert work("rope", t, h)[:2] == (4 * (2 * t * h + angles), 4 * 2 * t * h)
    assert work("softmax", t, h)[:2] == (8 * t * h, 4 * 3 * t * h)
    assert work("linear", t, h)[2:] == (3 * 2 * t * h * h, 0)
    assert work("attention", t, h)[2:] == (2 * t * t * h, 5 * t * t * h)
    # weights and both moments are read and written, gradients read
    assert work("adamw", t, h)[0] == pytest.approx(4 * 7 * t * h, abs=8)


def test_shares_and_ratios() -> None:
    seconds = {COPY: [0.5], "fused": [1.0], "reference": [3.0], COMPILED: [2.0]}
    of = comparison("told", "fused", seconds, {"threads": 2})
    memory = Measured(of, "rms_norm", FORWARD, "reference", 4e9, 8e9, 3e9, 1e9, False)
    rows = {row["side"]: row for row in kernels_report.as_dict(memory)["sides"]}
    assert rows[COPY]["gb_per_s"] == 6.0 and rows["fused"]["gb_per_s"] == 4.0
    assert rows["fused"]["share"] == 4 / 6
    assert rows["fused"]["faster_than_eager"] == 3.0 and rows["fused"]["faster_than_compile"] == 2.0
    assert rows["fused"]["faster_than_liger"] is None and rows[COPY]["faster_than_eager"] is None
    product = Measured(of, "linear", FORWARD, "reference", 4e9, 8e9, 3e9, 16e9, True)
    assert product.is_bound_by_memory and product.share("fused") == 4 / 6  # 0.67 s of copying, 0.5 s of products
    product = Measured(of, "linear", FORWARD, "reference", 4e9, 8e9, 3e9, 10e9, True)
    assert not product.is_bound_by_memory and product.share("fused") == 0.8
    text = kernels_report.table([memory])
    assert ["fused", "1000.000", "1000.000", "4.0", "8.0", "67%", "3.00", "2.00"] in map(str.split, text.splitlines())


def test_what_cannot_be_compiled_is_left_out_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: refuse)
    (one,) = measure("squares", Size(4, 128, torch.float32, CPU), rounds=1, peak=1.0)
    assert {side.name for side in one.comparison.sides} == {COPY, "reference", "foreach"}
    assert capsys.readouterr().err == "left out: squares by torch.compile: no compiler\n"
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    (one,) = measure("squares", Size(4, 128, torch.float32, CPU), rounds=1, peak=1.0)
    assert {side.name for side in one.comparison.sides} == {COPY, "reference", "foreach", COMPILED}


def test_liger_is_called_in_our_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert kernels.liger("swiglu") is None
    functions = SimpleNamespace(liger_swiglu=lambda gate, up: torch.nn.functional.silu(gate) * up)
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functions)
    x = torch.randn(3, 8)
    swiglu = kernels.liger("swiglu")
    assert swiglu is not None
    torch.testing.assert_close(swiglu(x), OPERATIONS["swiglu"].reference(x))
    assert kernels.liger("squares") is None


def test_the_command_line_is_checked() -> None:
    assert [size.dtype for size in sizes("cpu", None, 0, 0)] == [torch.float32, torch.bfloat16]
    assert sizes("cpu", ["fp16"], 5, 256) == [Size(5, 256, torch.float16, CPU)]
    with pytest.raises(ValueError, match="--dtype=fp8 is not one of fp32, bf16, fp16"):
        sizes("cpu", ["fp8"], 0, 0)
    with pytest.raises(ValueError, match="--hidden=100 must be at least 128, in steps of 128"):
        sizes("cpu", None, 0, 100)
    with pytest.raises(ValueError, match="--tokens=-1 must be at least 1"):
        sizes("cpu", None, -1, 128)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device=cuda, but torch sees no CUDA device"):
            sizes("cuda", None, 0, 0)
    with pytest.raises(ValueError, match="there is no case 'norm'"):
        bench.main(["kernels", *TINY, "--case", "norm"])


def test_a_peak_is_measured() -> None:
    assert peak_of(Size(1, 128, torch.float32, CPU), rounds=1) > 1e8


@pytest.mark.slow
def test_torch_compile_takes_its_turn() -> None:
    found = list(measure("rms_norm", Size(64, 128, torch.float32, CPU), rounds=1, peak=1e9))
    assert all(COMPILED in {side.name for side in one.comparison.sides} for one in found)
