"""Where the packages lie and how the C++ parts are built. Everything static stands in pyproject.toml.

`tools/` and `launch/` lie at the top of the repository, where a user looks for them, and are installed as
`megacore.tools` and `megacore.launch`.

The C++ parts are optional: each has a twin in Python. So where one cannot be built the installation goes on and says
what is lost. torch is not imported: csrc/data needs only pybind11, csrc/cpu only torch's headers and library, which an
isolated build does not see (launch/setup.sh therefore installs torch first and builds with --no-build-isolation).

csrc/cuda is built where torch was built for CUDA, or where MEGACORE_CUDA=1 asks for it (0: never).
"""

import os
import runpy
import sys
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

DATA, CPU, CUDA = "megacore.data._native", "megacore.kernels._cpu", "megacore.kernels.cuda._cuda"
CUDA_BUILD = runpy.run_path("megacore/kernels/cuda/build.py")
COSTS = {
    DATA: "sample indices of large corpora are built more slowly (numpy); it needs C++17",
    CPU: "AdamW, RMSNorm and SwiGLU on the CPU are torch's, not ours; it needs C++20, and torch where it is built:\n"
    "megacore: pip install torch setuptools pybind11, then pip install --no-build-isolation -e .",
    CUDA: "no kernel on the GPU is our C++/CUDA; it needs the CUDA toolkit (nvcc), and torch where it is built:\n"
    "megacore: pip install torch setuptools pybind11, then pip install --no-build-isolation -e .",
}


def report_missing(name: str, reason: object) -> None:
    """Say on stderr what is not there, what it costs and how to mend it (`pip install -v` shows it)."""
    sys.stderr.write(
        f"\nmegacore: the C++ part {name} was not built: {reason}\n"
        f"megacore: everything works without it, but {COSTS[name]}\n"
        "megacore: install a C++ compiler (Debian, Ubuntu: apt install g++; macOS: xcode-select --install) and\n"
        "megacore: run the installation again.\n\n"
    )


class OptionalBuildExt(build_ext):
    """build_ext that goes on, with a clear message, where an extension cannot be built."""

    def build_extension(self, ext: Extension) -> None:
        try:
            if ext.name == CUDA:
                CUDA_BUILD["compile_library"](
                    Path(self.get_ext_fullpath(CUDA)), installed_torch(), CUDA_BUILD["find_nvcc"]()
                )
            else:
                super().build_extension(ext)
        except Exception as reason:  # whatever a compiler, or its absence, does here must not stop the installation
            report_missing(ext.name, reason)


def installed_torch() -> Path:
    """The package's folder. Raises ImportError if there is none."""
    found = find_spec("torch")
    if not found or not found.submodule_search_locations:
        raise ImportError("torch is not installed where it is built")
    return Path(found.submodule_search_locations[0])


def sources_of(folder: str) -> tuple[list[str], list[str]]:
    """A folder's sources and headers."""
    sources = sorted([*glob(f"{folder}/*.cpp"), *glob(f"{folder}/*.cu")])
    if not sources:
        raise ImportError(f"{folder} is not here")
    return sources, sorted(glob(f"{folder}/*.h"))


def data_helper() -> Extension:
    """csrc/data, a Python module over numpy arrays."""
    from pybind11.setup_helpers import Pybind11Extension  # absent only with --no-build-isolation

    sources, headers = sources_of("csrc/data")
    return Pybind11Extension(DATA, sources, depends=headers, cxx_std=17, extra_compile_args=["-O3"], optional=True)


def cpu_kernels() -> Extension:
    """csrc/cpu, operations of torch through its stable ABI: a library that torch loads, not a Python module."""
    torch = installed_torch()
    sources, headers = sources_of("csrc/cpu")
    return Extension(
        CPU,
        sources,
        depends=headers,
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],  # 2.10: the oldest torch that may load it
        # No contraction to fused multiply-adds: every instruction set, tail and thread gives the same bits.
        extra_compile_args=["-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
        + ["-isystem", str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
        optional=True,
    )


def cuda_kernels() -> Extension:
    """csrc/cuda, which nvcc compiles (kernels/cuda/build.py)."""
    installed_torch()
    if not CUDA_BUILD["find_nvcc"]():
        raise ImportError("nvcc is neither on the PATH nor in /usr/local/cuda/bin")
    sources, headers = sources_of("csrc/cuda")
    return Extension(CUDA, sources, depends=headers, optional=True)


def wants_cuda() -> bool:
    """Whether csrc/cuda is of use here: its compilation takes a minute."""
    asked = os.environ.get("MEGACORE_CUDA", "")
    if asked:
        return asked != "0"
    try:
        return bool(CUDA_BUILD["cuda_of"](installed_torch()))
    except ImportError:
        return False


def extensions() -> list[Extension]:
    """What can be built here."""
    found = []
    parts = [(DATA, data_helper), (CPU, cpu_kernels), *([(CUDA, cuda_kernels)] if wants_cuda() else [])]
    for name, make in parts:
        try:
            found.append(make())
        except ImportError as reason:
            report_missing(name, reason)
    return found


setup(
    packages=[*find_packages(include=["megacore", "megacore.*"]), "megacore.tools", "megacore.launch"],
    package_dir={"megacore.tools": "tools", "megacore.launch": "launch"},
    package_data={
        "megacore.config.presets": ["*.toml"],
        "megacore.launch": ["recipes/*.toml"],
        "megacore.monitor.report": ["page.*"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuildExt},
)
