"""Compiles csrc/cuda: for GPUs, or for the emulated device of the tests. Uses the standard library only: setup.py runs
this file by itself, before anything is installed.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parents[3] / "csrc" / "cuda"

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities without their dot: A100, H100 and H200, B200."""

TARGET = "TORCH_TARGET_VERSION=0x020a000000000000"
"""2.10: the oldest torch that may load it."""

WARNINGS = ("-Wall", "-Wextra")


def find_nvcc() -> str:
    """The compiler of the CUDA toolkit, or '' if there is none."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin") or ""


def cuda_of(torch: Path) -> str:
    """The version of CUDA that an installed torch was built for, or ''; torch is not imported."""
    version = torch / "version.py"
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", version.read_text(), re.M) if version.exists() else None
    return found[1] if found else ""


def compile_library(
    output: Path,
    torch: Path,
    nvcc: str,
    architectures: Sequence[int] = ARCHITECTURES,
    options: Sequence[str] = (),
    sources: Path = SOURCES,
) -> str:
    """``output``, a library for GPUs, against the headers of the package folder ``torch``; ``options`` go to nvcc.

    Returns what the compilers said. Raises RuntimeError, with it, where one fails or warns.
    """
    codes = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in architectures]
    if architectures:  # what comes after the last of them may compile it anew
        codes.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    host = ",".join(("-fPIC", "-fvisibility=hidden", *WARNINGS))
    common = (nvcc, "-std=c++20", "-O3", f"-D{TARGET}", "-DUSE_CUDA", "-isystem", str(torch / "include"))
    compiler = (*common, *codes, *options, "--Werror", "all-warnings", "-Xcompiler", host, "-c")
    linker = (nvcc, "-shared", "-cudart", "static", "-Xlinker", "--no-undefined", f"-L{torch / 'lib'}")
    return _build(output, {".cu": compiler, ".cpp": compiler}, linker, sources)


def compile_emulated(output: Path, torch: Path, checked: bool, sources: Path = SOURCES) -> str:
    """``output``, the same kernels for CPU tensors, by g++ and csrc/cuda/emulator.h: what they compute can be tested;
    their speed says nothing. ``checked``: misaligned addresses and other undefined behaviour end the process."""
    host = ["g++", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", *WARNINGS, "-Werror"]
    # Vectors of registers that no column was read into are not used either; the compiler cannot know.
    host += ["-Wno-maybe-uninitialized", "-DMEGACORE_EMULATED", f"-D{TARGET}", "-isystem", str(torch / "include"), "-c"]
    checks = ("-fsanitize=undefined", "-fno-sanitize=vptr,float-divide-by-zero", "-fno-sanitize-recover=all")
    device = (*host, "-O1" if checked else "-O0", *(checks if checked else ()), "-x", "c++")
    linker = ("g++", "-shared", *(checks if checked else ()), f"-L{torch / 'lib'}")
    return _build(output, {".cu": device, ".cpp": tuple(host)}, linker, sources)


def _build(output: Path, compilers: Mapping[str, Sequence[str]], linker: Sequence[str], sources: Path) -> str:
    """Each source by the command of its suffix, as many at once as there are cores; then all of them together."""
    files = sorted(each for each in sources.iterdir() if each.suffix in compilers)
    if not files:
        raise RuntimeError(f"{sources} holds no sources")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = [str(Path(folder) / f"{each.name}.o") for each in files]
        commands = [(*compilers[each.suffix], str(each), "-o", to) for each, to in zip(files, objects, strict=True)]
        told = list(pool.map(_call, commands))
        told.append(_call((*linker, "-o", str(output), *objects, "-ltorch_cpu")))
    return "".join(told)


def _call(command: Sequence[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout
