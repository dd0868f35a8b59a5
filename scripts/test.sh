#!/usr/bin/env bash
# Installs what the tests need into .venv (made if there is none) and runs the suite, without torch; the long matrices are
# left out (pytest -m full). Arguments go to pytest: bash scripts/test.sh tests/models
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
install_fmjax test
exec "$VENV/bin/python" -m pytest -n 2 -m "not full" "$@"
