"""Our Triton kernels without a GPU: in Triton's interpreter, and compiled for one."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megacore.kernels.operations import OPERATIONS, cast, tensors_of
from megacore.kernels.table import TABLE
from megacore.kernels.triton import available

ROOT = Path(__file__).parents[2]
HERE = "tests/kernels"
CPU = torch.device("cpu")
OURS = [kernel for kernel in TABLE if kernel.backend == "triton"]

needed = pytest.mark.skipif(bool(available.unavailable()), reason=available.unavailable() or "triton is here")


def interpret(*arguments: str) -> str:
    """pytest in a process whose triton is an interpreter: that is decided when triton is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@needed
def test_kernels_are_their_references() -> None:
    """In float32 on strided inputs: every kernel of the table."""
    told = interpret(
        f"{HERE}/test_table.py", "-k", "reference and not gpu and triton and (float32-sliced or adamw-triton)"
    )
    assert f"{len(OURS) + 1} passed" in told  # adamw, which takes no strides, also in float64


@needed
def test_kernels_are_operations_of_torch() -> None:
    """What torch's checks say of some; of all in the slow test below."""
    told = interpret(f"{HERE}/test_triton_operations.py", "-k", "not fault or rms_norm_add or squares or rope_")
    assert "skipped" not in told.splitlines()[-1]


@needed
@pytest.mark.slow
@pytest.mark.parametrize("tests", ["test_table.py", "test_triton_operations.py"])
def test_kernels_in_all_formats_and_layouts(tests: str) -> None:
    assert "passed" in interpret(f"{HERE}/{tests}", "-k", "triton")


def signature_of(function: Any, args: tuple[Any, ...], settings: dict[str, Any]) -> tuple[dict, dict]:
    """(types, constants) by parameter, of a launch."""
    from triton.runtime.jit import mangle_type

    types, constants = {}, {}
    bound = dict(zip(function.arg_names, args)) | {k: v for k, v in settings.items() if k in function.arg_names}
    for param in function.params:
        value = bound[param.name]
        if param.is_constexpr:
            types[param.name], constants[(param.num,)] = "constexpr", value
        else:
            types[param.name] = mangle_type(value)
    return types, constants


@pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
@pytest.mark.parametrize(
    ("dtype", "capability"),
    [
        pytest.param(torch.bfloat16, 90),
        *(pytest.param(dtype, 90, marks=pytest.mark.slow) for dtype in (torch.float16, torch.float32, torch.float64)),
        *(pytest.param(torch.bfloat16, capability, marks=pytest.mark.slow) for capability in (80, 100)),
    ],
)
def test_kernels_compile_for_a_gpu(dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch of an example is compiled to machine code; nothing is run."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    launched: dict[str, tuple[Any, dict, dict]] = {}

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        types, constants = signature_of(self, args, settings)
        name = f"{self.module}.{self.__name__} {sorted(map(str, constants.values()))}"
        launched.setdefault(name, (self, types, constants))

    monkeypatch.setattr(JITFunction, "run", record)
    torch.manual_seed(0)
    for kernel in OURS:
        operation = OPERATIONS[kernel.operation]
        wide = dtype if dtype in operation.tolerance else torch.float32
        args = cast(operation.sample(4, 256), wide)
        for place in operation.with_grad:
            args[place].requires_grad_()
        results = [result for result in tensors_of(operation.call(kernel.loaded, *args)) if result.requires_grad]
        if results:
            torch.autograd.grad(results, [args[place] for place in operation.with_grad], results)
    kinds = {f"{function.module}.{function.__name__}" for function, _, _ in launched.values()}
    assert len(kinds) == 12, sorted(kinds)
    for name, (function, types, constants) in launched.items():
        source = ASTSource(fn=function, signature=types, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"], name


def test_where_triton_is_missing_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "find_spec", lambda name: None)
    available.unavailable.cache_clear()
    try:
        assert available.refuses(torch.device("cuda"), torch.float32).startswith("triton is not installed")
    finally:
        available.unavailable.cache_clear()


@needed
def test_without_a_gpu_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(available, "interpreted", lambda: False)
    assert available.refuses(CPU, torch.float32).startswith("no CUDA device")
    assert available.refuses(torch.device("cuda"), torch.float32) == ""
    assert "not torch.int32" in available.refuses(torch.device("cuda"), torch.int32)
    monkeypatch.setattr(available, "interpreted", lambda: True)
    assert available.refuses(CPU, torch.float32) == ""
    assert "for the CPU, not cuda" in available.refuses(torch.device("cuda"), torch.float32)
