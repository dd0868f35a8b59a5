#!/usr/bin/env bash
# Installs the tests' requirements into .venv (created if missing) and runs the suite, without torch. --full runs the long
# matrices, which the suite skips, instead. Other arguments go to pytest: bash scripts/test.sh tests/models
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
install_fmjax test
tests="not full"
if [ "${1:-}" = --full ]; then
  tests=full
  shift
fi
# A worker runs whole files, as far as that keeps both busy, so that each file compiles its programs once.
exec "$VENV/bin/python" -m pytest -n 2 --dist worksteal -m "$tests" "$@"
