#!/usr/bin/env bash
# Installs what the tests need into .venv (created if there is none) and runs the suite, without torch. --full runs the long
# matrices instead, which the suite leaves out. Other arguments go to pytest: bash scripts/test.sh tests/models
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
install_fmjax test
tests="not full"
if [ "${1:-}" = --full ]; then
  tests=full
  shift
fi
# A worker runs whole files, as far as that keeps both busy: what a file compiles is compiled once.
exec "$VENV/bin/python" -m pytest -n 2 --dist worksteal -m "$tests" "$@"
