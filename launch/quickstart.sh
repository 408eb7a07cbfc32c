#!/usr/bin/env bash
# From a fresh clone to a trained model: set-up in .venv, then the demo. Arguments go to `megacore demo`, such as
# --text PATH for a text of your own.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${MEGACORE_VENV:-$root/.venv}

bash "$root/launch/setup.sh" plots,data,monitor
exec "$venv/bin/megacore" demo "$@"
