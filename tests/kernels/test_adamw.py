"""AdamW's backends: the same step from each, and of csrc/cpu every bit."""

import subprocess
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megacore.kernels import adamw, native
from megacore.kernels.adamw import AdamW, Moments, Rates
from megacore.kernels.choice import Choice

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
FP32, BF16 = torch.float32, torch.bfloat16
LR, DECAY, BETA1, BETA2, EPS = 3e-2, 0.1, 0.9, 0.95, 1e-8
SIZES = (1, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1000, 40_001)

compiled = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())


class Problem:
    """Runs of all sizes, each starting somewhere else relative to vectors and cache lines; some numbers are odd."""

    def __init__(
        self,
        dtype: torch.dtype = FP32,
        grad: torch.dtype = FP32,
        moment: torch.dtype = FP32,
        coupled: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.placed = 0
        self.weights = [self.place(torch.randn(size, dtype=torch.float64).to(dtype)) for size in SIZES]
        self.grads = [self.place((3e-3 * torch.randn(size, dtype=torch.float64)).to(grad)) for size in SIZES]
        self.grads[-1][:4] = torch.tensor([0.0, -0.0, 1e-30, 1e15])
        self.moments = Moments(
            [self.place((1e-3 * torch.randn(size)).to(moment)) for size in SIZES],
            [self.place((1e-6 * torch.rand(size)).to(moment)) for size in SIZES],
            torch.full((), 3.0),
        )
        self.rates = Rates(
            [LR * (1 + i % 3) for i in range(len(SIZES))],
            [DECAY * (i % 2) for i in range(len(SIZES))],
            BETA1,
            BETA2,
            EPS,
            coupled,
        )
        self.copies = [self.place(torch.zeros(size, dtype=BF16)) for size in SIZES]

    def place(self, values: Tensor) -> Tensor:
        """The values at an address that no vector unit likes."""
        self.placed += 1
        start = self.placed % 16
        return torch.cat((values.new_zeros(start), values))[start:]

    @property
    def changed(self) -> list[Tensor]:
        return [*self.weights, *self.moments.first, *self.moments.second, *self.copies]

    def step(self, function: AdamW, taken: float = 1.0, **options: object) -> list[Tensor]:
        """What one step leaves."""
        done = torch.full((), taken)
        function(self.weights, self.grads, self.moments, self.rates, done, self.copies, **options)
        return self.changed


def in_numpy(problem: Problem, kind: type[np.floating]) -> list[Tensor]:
    """The step's formula in numpy, in one precision throughout; nothing is rounded before the end."""
    wide = kind is np.float64

    def array(tensor: Tensor) -> np.ndarray:
        return tensor.double().numpy().astype(kind)

    clock, rates = float(problem.moments.clock), problem.rates
    results: tuple[list[Tensor], ...] = ([], [], [])
    for i in range(len(SIZES)):
        weight, decay = array(problem.weights[i]), rates.weight_decay[i]
        grad = array(problem.grads[i]) + kind(decay if rates.coupled else 0) * weight
        first = kind(BETA1) * array(problem.moments.first[i]) + kind(1 - BETA1) * grad
        second = kind(BETA2) * array(problem.moments.second[i]) + kind(1 - BETA2) * grad * grad
        step, unbias = kind(rates.lr[i] / (1 - BETA1**clock)), kind(1 / np.sqrt(1 - BETA2**clock))
        keep = kind(1 if rates.coupled else 1 - rates.lr[i] * decay)
        new = keep * weight - step * first / (np.sqrt(second) * unbias + kind(EPS))
        for results_of, value in zip(results, (new, first, second)):
            results_of.append(torch.from_numpy(value.astype(np.float64 if wide else np.float32)))
    return [tensor for part in results for tensor in part]


def assert_same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        bits = torch.int16 if one.dtype == BF16 else torch.int32
        assert one.dtype == other.dtype
        assert torch.equal(one.view(bits), other.view(bits)), (one.numel(), (one - other).abs().max())


@compiled
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("moment", [FP32, BF16])
@pytest.mark.parametrize("grad", [FP32, BF16])
@pytest.mark.parametrize("coupled", [False, True])
def test_every_instruction_set_gives_the_bits_of_the_formula(
    coupled: bool, grad: torch.dtype, moment: torch.dtype, isa: str
) -> None:
    """In float32, operation by operation; moments in bf16 and the copies are rounded to the nearest, ties to even."""
    if isa not in native.instruction_sets():
        pytest.skip(f"this processor has no {isa}")
    want = in_numpy(Problem(FP32, grad, moment, coupled), np.float32)
    weights, moments = want[: len(SIZES)], [tensor.to(moment) for tensor in want[len(SIZES) :]]
    got = Problem(FP32, grad, moment, coupled).step(adamw.compiled, isa=isa)
    assert_same_bits(got, [*weights, *moments, *(weight.to(BF16) for weight in weights)])


@compiled
def test_the_compiled_step_is_within_rounding_of_float64() -> None:
    """Two units in the last place of the largest term that is added up (moments of both signs may cancel)."""
    before = Problem()
    exact = in_numpy(before, np.float64)
    unit = 2.0**-23
    got = Problem().step(adamw.compiled)
    count = len(SIZES)
    for i in range(count):
        first_terms = torch.maximum(before.moments.first[i].abs(), before.grads[i].abs()).double()
        first_error = (got[count + i] - exact[count + i]).abs()
        assert bool((first_error <= 2 * unit * first_terms).all())
        torch.testing.assert_close(got[2 * count + i].double(), exact[2 * count + i], rtol=2 * unit, atol=0)
        change = (exact[i] - before.weights[i]).abs() + before.rates.lr[i] * 3
        assert bool(((got[i] - exact[i]).abs() <= 2 * unit * (before.weights[i].abs() + change)).all())


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_change_no_bit(threads: int) -> None:
    one, many = Problem(), Problem()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = one.step(adamw.compiled)
        torch.set_num_threads(threads)
        got = many.step(adamw.compiled)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(got, want)


@compiled
def test_bf16_keeps_what_is_not_a_number_and_rounds_ties_to_even() -> None:
    values = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.4e38, torch.nan, 1e-40])
    grads, zeros, copy = torch.zeros(6), torch.zeros(6), torch.zeros(6, dtype=BF16)
    moments = Moments([zeros], [zeros.clone()], torch.ones(()))
    adamw.compiled([values], [grads], moments, Rates([0.0], [0.0], 0.9, 0.95, 1e-8), torch.ones(()), [copy])
    assert copy.isnan().tolist() == [False] * 4 + [True, False]
    assert torch.equal(copy.nan_to_num(nan=0.5), values.to(BF16).nan_to_num(nan=0.5))
    assert copy[0] == 1.0 and copy[1] == 1.015625 and copy[3].isinf()


@pytest.mark.parametrize("function", [pytest.param(adamw.compiled, marks=compiled), adamw.fused, adamw.reference])
@pytest.mark.parametrize("coupled", [False, True])
def test_backends_agree(coupled: bool, function: AdamW) -> None:
    got_of, want_of = Problem(coupled=coupled).step(function), Problem(coupled=coupled).step(adamw.reference)
    for got, want in zip(got_of, want_of, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2 if got.dtype == BF16 else 1e-5, atol=1e-7)


def test_float64_is_float64_throughout() -> None:
    wide = (torch.float64,) * 3
    for coupled in (False, True):
        want = in_numpy(Problem(*wide, coupled), np.float64)
        for function in (adamw.fused, adamw.reference):
            for got, exact in zip(Problem(*wide, coupled).step(function), want):
                torch.testing.assert_close(got, exact, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("function", [pytest.param(adamw.compiled, marks=compiled), adamw.fused, adamw.reference])
def test_a_step_that_is_not_taken_changes_no_bit(function: AdamW) -> None:
    problem, before = Problem(), Problem()
    for grad in problem.grads:
        grad.zero_()
    for weight, copy in zip(before.weights + problem.weights, before.copies + problem.copies):
        copy.copy_(weight)
    assert_same_bits(problem.step(function, taken=0.0), before.changed)


@compiled
def test_no_runs_are_no_work() -> None:
    adamw.compiled([], [], Moments([], [], torch.ones(())), Rates([], [], 0.9, 0.95, 1e-8), torch.ones(()))


@compiled
def test_what_does_not_fit_together_is_refused() -> None:
    def refused(match: str, place: str, value: object, grad: torch.dtype = FP32) -> None:
        problem = Problem(grad=grad)
        getattr(problem, place)[2] = value
        with pytest.raises(RuntimeError, match=match):
            problem.step(adamw.compiled)

    refused(r"weights\[2\] must be contiguous", "weights", torch.zeros(SIZES[2], dtype=torch.float64))
    refused(r"grads\[2\] must be contiguous", "grads", torch.zeros(SIZES[2] + 1))
    refused(r"grads\[2\] must be contiguous", "grads", torch.zeros(2 * SIZES[2])[::2])
    refused(r"grads\[2\].*dtype of grads\[0\]", "grads", torch.zeros(SIZES[2], dtype=BF16))
    refused(r"copies\[2\]", "copies", torch.zeros(SIZES[2]))
    with pytest.raises(RuntimeError, match="must be float32 or bfloat16"):
        Problem(grad=torch.float16).step(adamw.compiled)
    with pytest.raises(RuntimeError, match="isa 'sse' is not one of this processor's: .*portable"):
        Problem().step(adamw.compiled, isa="sse")
    problem = Problem()
    problem.grads.pop()
    with pytest.raises(RuntimeError, match="lists of different lengths"):
        problem.step(adamw.compiled)


@compiled
def test_the_operation_is_known_to_torchs_compiler() -> None:
    """Its schema says what it writes to, and it can be traced on tensors without numbers."""
    problem = Problem()
    arguments = (
        *(problem.weights, problem.grads, problem.moments.first, problem.moments.second, problem.copies),
        *(problem.moments.clock, torch.ones(())),
        *(problem.rates.lr, problem.rates.weight_decay, False, BETA1, BETA2, EPS, ""),
    )
    torch.library.opcheck(
        torch.ops.megacore_cpu.adamw_.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_the_first_that_can_is_chosen_and_the_others_have_reasons() -> None:
    function, choice = adamw.choose(CPU, FP32, FP32)
    if reason := native.unavailable():
        assert (function, choice.backend, choice.rejected) == (adamw.fused, "torch", (f"native: {reason}",))
    else:
        assert (function, choice.rejected) == (adamw.compiled, ())
        assert choice.backend == f"native ({native.instruction_sets()[0]})"
    function, choice = adamw.choose(CPU, torch.float64, torch.float64)
    assert (function, choice.backend) == (adamw.fused, "torch")
    assert choice.rejected == ("native: it updates float32 weights, not torch.float64",)
    function, choice = adamw.choose(CPU, FP32, torch.float16)
    assert (function, len(choice.rejected)) == (adamw.reference, 5)
    _, choice = adamw.choose(torch.device("cuda"), FP32, FP32)
    assert choice.rejected == ("native: it is for the CPU, not cuda",)
    assert adamw.choose(CPU, FP32, FP32, "torch")[0] is adamw.fused
    with pytest.raises(ValueError, match="no backend 'metal'"):
        adamw.choose(CPU, FP32, FP32, "metal")
    with pytest.raises(ValueError, match="apex: no CUDA device"):
        adamw.choose(CPU, FP32, FP32, "apex")


def test_without_the_library_the_reason_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    look = native.unavailable.__wrapped__  # once per process would be too seldom here
    with monkeypatch.context() as patch:
        patch.setattr(native, "__file__", str(tmp_path / "native.py"))
        assert "csrc/cpu is not built; with a C++20 compiler" in look()
        (tmp_path / f"_cpu{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
        assert "does not load" in look()
    monkeypatch.setattr(native, "unavailable", lambda: "it is not there")
    assert adamw.choose(CPU, FP32, FP32)[1] == Choice("adamw", "torch", ("native: it is not there",))


def test_the_sources_compile_without_a_warning(tmp_path: Path) -> None:
    compiler = str(sysconfig.get_config_var("CXX") or "g++").split()[0]
    include = Path(torch.__file__).parent / "include"
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        command = [compiler, "-std=c++20", "-O3", "-fPIC", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
        command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(include), "-c", str(source)]
        try:
            done = subprocess.run([*command, "-o", str(tmp_path / "out.o")], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip(f"no compiler {compiler} here")
        assert done.returncode == 0, done.stderr
