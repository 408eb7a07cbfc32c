#!/usr/bin/env bash
# Set-up if needed, then lint, types and all tests. Arguments go to pytest, such as -k NAME or -x.
# All parts run even if one fails; the exit code is 0 only if all passed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export MEGACORE_VENV=${MEGACORE_VENV:-$PWD/.venv}

bash launch/setup.sh all
bin=$MEGACORE_VENV/bin
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
# Slow tests too, which plain pytest leaves out. Those marked gpu need a CUDA device.
if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus >/dev/null 2>&1; then marks=""; else marks="not gpu"; fi
part tests "$bin/python" -m pytest -q -m "$marks" "$@"

echo
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
echo "all passed in $SECONDS s"
