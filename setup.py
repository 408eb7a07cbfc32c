"""Where the packages lie and how the C++ helper is built. Everything static stands in pyproject.toml.

`tools/` and `launch/` lie at the top of the repository, where a user looks for them, and are installed as
`megacore.tools` and `megacore.launch`.

The C++ helper is optional: megacore.data has a numpy path for every function in it. So where there is no
compiler the installation goes on and says what is lost. torch is not imported: building needs only pybind11.
"""

import sys
from glob import glob

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

NATIVE = "megacore.data._native"


def report_missing(reason: object) -> None:
    """Say on stderr what is not there, what it costs and how to mend it (`pip install -v` shows it)."""
    sys.stderr.write(
        f"\nmegacore: the C++ helper {NATIVE} was not built: {reason}\n"
        "megacore: everything works without it, but sample indices of large corpora are built more slowly (numpy).\n"
        "megacore: install a C++17 compiler (Debian, Ubuntu: apt install g++; macOS: xcode-select --install) and\n"
        "megacore: run the installation again.\n\n"
    )


class OptionalBuildExt(build_ext):
    """build_ext that goes on, with a clear message, where an extension cannot be built."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as reason:  # whatever a compiler, or its absence, does here must not stop the installation
            report_missing(reason)


def extensions() -> list[Extension]:
    """The helper of csrc/data, or nothing where its sources or pybind11 are absent."""
    sources = sorted(glob("csrc/data/*.cpp"))
    if not sources:
        return []
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError as reason:  # only with --no-build-isolation; otherwise pyproject.toml brings it
        report_missing(reason)
        return []
    native = Pybind11Extension(
        NATIVE, sources, depends=sorted(glob("csrc/data/*.h")), cxx_std=17, extra_compile_args=["-O3"], optional=True
    )
    return [native]


setup(
    packages=[*find_packages(include=["megacore", "megacore.*"]), "megacore.tools", "megacore.launch"],
    package_dir={"megacore.tools": "tools", "megacore.launch": "launch"},
    package_data={"megacore.config.presets": ["*.toml"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuildExt},
)
