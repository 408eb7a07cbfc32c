#!/usr/bin/env bash
# Set-up shared by launch/quickstart.sh and tests/run.sh: a virtual environment with megacore installed in it, editable.
#
#   bash launch/setup.sh [EXTRAS]      EXTRAS as in pyproject.toml, such as "plots,data"; default: all
#
# Quick when nothing has changed since the last time. From the environment, where set:
#   MEGACORE_VENV    where the environment lies (default: .venv in the repository)
#   MEGACORE_TORCH   what pip installs as torch (default: torch==2.13.0)
#   PYTHON           the interpreter to make it with (default: the newest of python3.13, 3.12, 3.11 and python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1:-all}
venv=${MEGACORE_VENV:-.venv}
torch=${MEGACORE_TORCH:-torch==2.13.0}

say() { printf 'set-up: %s\n' "$*"; }
fail() { printf 'set-up: %s\n' "$*" >&2; exit 1; }

# pip without its chatter (notes about index locations spoil the first screen): shown only where it fails.
pip_install() {
    local log code=0
    log=$(mktemp)
    "$venv/bin/python" -m pip install --disable-pip-version-check "$@" >"$log" 2>&1 || code=$?
    if [ "$code" -ne 0 ]; then
        tail -n 30 "$log" >&2
        say "pip could not install ${*: -1}; its last lines stand above" >&2
    fi
    rm -f "$log"
    return "$code"
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
        if new_enough "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "megacore needs Python 3.11 or newer, and ${PYTHON:-python3} is not; install one, or name it: PYTHON=/path/to/python3.12 bash $0"
}

# What the installation depends on: if none of it has changed, there is nothing to install.
fingerprint() {
    "$venv/bin/python" - "$torch" <<'PYTHON'
import hashlib, pathlib, sys

digest = hashlib.sha256(f"{sys.version} {sys.argv[1]} {pathlib.Path.cwd()}".encode())
sources = pathlib.Path("csrc").rglob("*") if pathlib.Path("csrc").is_dir() else ()
for path in [pathlib.Path("setup.py"), pathlib.Path("pyproject.toml"), *sorted(p for p in sources if p.is_file())]:
    digest.update(str(path).encode() + b"\0" + path.read_bytes())
print(digest.hexdigest())
PYTHON
}

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "making the environment $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" ||
        fail "$python cannot make environments; on Debian and Ubuntu: apt install python3-venv"
fi
new_enough "$venv/bin/python" || fail "$venv holds a Python older than 3.11; remove that folder and start again"

fingerprint=$(fingerprint)
for done in all "$extras"; do
    if [ "$(cat "$venv/.megacore-$done" 2>/dev/null)" = "$fingerprint" ]; then
        say "$venv is up to date"
        exit 0
    fi
done

say "installing $torch (the first time it is downloaded: several minutes)"
pip_install "$torch"
say "installing megacore[$extras] and building its C++ parts"
# What pyproject.toml asks for building; without isolation, so that csrc/cpu finds the torch that it is compiled against.
pip_install "setuptools>=77" "pybind11>=2.13"
pip_install --no-build-isolation --editable ".[$extras]"
if ! "$venv/bin/python" -c 'import megacore.data._native' 2>/dev/null; then
    say "the C++ helper could not be built, so numpy does its work: all results are the same, sample indices of large"
    say "corpora take longer. With a C++17 compiler (Debian, Ubuntu: apt install g++), remove $venv and start again."
fi
if ! lost=$("$venv/bin/python" -c 'from megacore.kernels import native; print(native.unavailable(), end="")' 2>&1) || [ -n "$lost" ]; then
    say "the C++ kernels for the CPU are not there, so torch does their work: $lost"
fi
printf '%s' "$fingerprint" >"$venv/.megacore-$extras"
say "done"
