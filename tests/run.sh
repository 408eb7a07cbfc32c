#!/usr/bin/env bash
# Set-up if needed, then lint, types and all tests but the slow ones. Arguments go to pytest, such as -k NAME or -x.
# All parts run even if one fails; the exit code is 0 only if all passed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export MEGACORE_VENV=${MEGACORE_VENV:-$PWD/.venv}

bash launch/setup.sh all
bin=$MEGACORE_VENV/bin

# Megatron-LM's own dataset code, to compare bytes and indices with. Its metadata asks for a newer Python and for packages
# that those modules do without, so it cannot be an extra. Where it cannot be had, the tests that need it are skipped.
oracle=megatron-core==0.19.2
if ! "$bin/python" -m pip show --quiet megatron-core 2>/dev/null; then
    "$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python "$oracle" ||
        echo "tests: $oracle cannot be installed here; tests that compare with it are skipped"
fi
# The sources of transformer-engine, to hold against what is called of them. Its universal wheel (1.2 MB) has no binaries
# and could not be imported, so it is kept apart from what is installed.
contract=transformer-engine==2.20.2
if [ ! -e "$MEGACORE_VENV/contracts/transformer_engine-${contract##*==}.dist-info" ]; then
    rm -rf "$MEGACORE_VENV/contracts"
    "$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$MEGACORE_VENV/contracts" \
        "$contract" || echo "tests: $contract cannot be had here; tests that read its sources are skipped"
fi
failed=()

part() {
    local name=$1 start=$SECONDS
    shift
    printf '\n%s: %s\n' "$name" "$*"
    if "$@"; then
        printf '%s: passed in %d s\n' "$name" $((SECONDS - start))
    else
        printf '%s: FAILED after %d s\n' "$name" $((SECONDS - start))
        failed+=("$name")
    fi
}

part lint "$bin/ruff" check .
part format "$bin/ruff" format --check --quiet .
part types "$bin/mypy"
# Those marked gpu need a CUDA device. Those marked slow take their time: `bash tests/run.sh -m slow` runs them.
marks="not slow"
if ! nvidia-smi --list-gpus >/dev/null 2>&1; then marks="$marks and not gpu"; fi
# One thread per process: matrices in tests are tiny, and the workers of distributed tests share the cores.
export OMP_NUM_THREADS=1
part tests "$bin/python" -m pytest -q -m "$marks" "$@"

echo
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
echo "all passed in $SECONDS s"
