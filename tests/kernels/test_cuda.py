"""Our CUDA kernels without a GPU: compiled for GPUs, loaded, and run on the emulated device (csrc/cuda/emulator.h),
which g++ makes of the same sources."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megacore.kernels.cuda import build, library
from megacore.kernels.table import TABLE

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent
OURS = [kernel for kernel in TABLE if kernel.backend == "cuda"]
NVCC = build.find_nvcc()

with_nvcc = pytest.mark.skipif(not NVCC, reason="the CUDA toolkit's nvcc is not here")
with_gcc = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not here")

START = """
import sys
from pathlib import Path
import pytest
from megacore.kernels.cuda import library
reason = library.load(Path(sys.argv[1]))
sys.exit(reason or pytest.main(sys.argv[2:]))
"""


def run_tests(file: Path, *arguments: str) -> str:
    """pytest in a process that has loaded this library: a process can have only one. Returns its last line."""
    done = subprocess.run(
        [sys.executable, "-c", START, str(file), "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


@with_nvcc
def test_kernels_compile_and_load(tmp_path: Path) -> None:
    """For sm_90, warnings being errors. The library loads without a GPU; of all operations torch knows schema and
    shapes, backward too."""
    build.compile_library(tmp_path / "_cuda.so", TORCH, NVCC, (90,))
    told = run_tests(
        tmp_path / "_cuda.so", "tests/kernels/test_cuda_operations.py", "tests/kernels/test_table.py",
        "-k", "known_to_torch or (cuda and numbers_go_through)",
    )  # fmt: skip
    assert told.startswith(f"{len(OURS) + 1} passed")


@with_gcc
def test_kernels_are_their_references(tmp_path: Path) -> None:
    """In float32 on strided inputs: every kernel of the table."""
    build.compile_emulated(tmp_path / "_emulated.so", TORCH, checked=False)
    told = run_tests(
        tmp_path / "_emulated.so", "tests/kernels/test_table.py",
        "-k", "reference and not gpu and cuda and (float32-sliced or (adamw and float32-contiguous))",
    )  # fmt: skip
    assert told.startswith(f"{len(OURS)} passed")


@with_gcc
@pytest.mark.slow
def test_kernels_in_all_formats_layouts_and_sizes(tmp_path: Path) -> None:
    """Misaligned addresses and other undefined behaviour end the process."""
    build.compile_emulated(tmp_path / "_emulated.so", TORCH, checked=True)
    assert "passed" in run_tests(tmp_path / "_emulated.so", "tests/kernels/test_table.py", "-k", "cuda and not gpu")
    assert "skipped" not in run_tests(tmp_path / "_emulated.so", "tests/kernels/test_cuda_operations.py")


@with_nvcc
@pytest.mark.slow
def test_for_all_gpus_nothing_spills(tmp_path: Path) -> None:
    """Registers suffice: no kernel keeps numbers of its own in memory."""
    told = build.compile_library(tmp_path / "_cuda.so", TORCH, NVCC, options=("-Xptxas", "-v"))
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", told)
    for architecture in build.ARCHITECTURES:
        assert told.count(f"for 'sm_{architecture}'") >= 50
    assert len(stacks) >= 150
    for _, stores, loads in stacks:
        assert (stores, loads) == ("0", "0"), told


@with_gcc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("barrier", "told"),
    [("sync_block();", "right"), ("", "wrong"), ("if (threadIdx.x < 5) sync_block();", "a barrier that not all")],
)
def test_the_emulated_device_sees_barriers(barrier: str, told: str, tmp_path: Path) -> None:
    """Neighbours exchange numbers: without a barrier some read what is not there yet."""
    (tmp_path / "kernel.cpp").write_text(f"""
#include <cstdio>
#include "device.h"
using namespace megacore::gpu;
__global__ void turn(float* out) {{
    __shared__ float numbers[64];
    numbers[threadIdx.x] = static_cast<float>(threadIdx.x + 100 * blockIdx.x);
    {barrier}
    out[blockIdx.x * 64 + threadIdx.x] = numbers[(threadIdx.x + 1) % 64];
}}
int main() {{
    float out[256];
    try {{
        launch(turn, Dim{{4, 1, 1}}, Dim{{64, 1, 1}}, 0, nullptr, out);
    }} catch (const std::exception& reason) {{
        std::puts(reason.what());
        return 0;
    }}
    bool right = true;
    for (int i = 0; i < 256; ++i) right = right && out[i] == static_cast<float>((i + 1) % 64 + i / 64 * 100);
    std::puts(right ? "right" : "wrong");
}}
""")
    program = tmp_path / "kernel"
    flags = ("-std=c++20", "-DMEGACORE_EMULATED", f"-I{build.SOURCES}", "-isystem", TORCH / "include")
    subprocess.run(["g++", *flags, tmp_path / "kernel.cpp", "-o", program], check=True)
    assert told in subprocess.run([program], check=True, capture_output=True, text=True).stdout


@with_nvcc
@pytest.mark.slow
def test_warnings_are_errors(tmp_path: Path) -> None:
    (tmp_path / "kernel.cu").write_text("__global__ void kernel(int* out) { int unused = 1; *out = 2; }\n")
    with pytest.raises(RuntimeError, match="unused"):
        build.compile_library(tmp_path / "_cuda.so", TORCH, NVCC, (90,), sources=tmp_path)


def test_the_cuda_that_torch_was_built_for_is_read_without_torch(tmp_path: Path) -> None:
    version = tmp_path / "version.py"
    assert build.cuda_of(tmp_path) == ""
    version.write_text("__version__ = '2.13.0'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n")
    assert build.cuda_of(tmp_path) == ""
    version.write_text("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n")
    assert build.cuda_of(tmp_path) == "13.0"
    assert build.cuda_of(TORCH) == (torch.version.cuda or "")


def test_why_it_cannot_serve_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not load" in library.load(tmp_path / "_cuda.so")
    monkeypatch.setattr(library, "unavailable", lambda: "csrc/cuda is not built")
    assert library.refuses(torch.device("cuda"), torch.float32) == "csrc/cuda is not built"
    monkeypatch.setattr(library, "unavailable", lambda: "")
    monkeypatch.setattr(library, "emulated", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert library.refuses(torch.device("cpu"), torch.float32) == "no CUDA device"
    assert library.refuses(torch.device("cuda"), torch.bfloat16) == ""
    assert "not torch.float64" in library.refuses(torch.device("cuda"), torch.float64)
    monkeypatch.setattr(library, "emulated", lambda: True)
    assert library.refuses(torch.device("cpu"), torch.float16) == ""
    assert "for the CPU, not cuda" in library.refuses(torch.device("cuda"), torch.float16)
