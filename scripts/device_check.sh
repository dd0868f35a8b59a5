#!/usr/bin/env bash
# Checks fmjax on this machine's GPU or TPU in nine minutes at most, and prints one table; installs nothing.
#     bash scripts/device_check.sh [--rehearse] [--out DIR] [--minutes 9]
# Uses .venv or the Python on the PATH that has JAX, or PYTHON=/path/to/python. Wheels that are pure Python, in
# WHEELS (default: .wheels), are importable too.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"

find_jax() {
  local candidate
  for candidate in ${PYTHON:-"$root/.venv/bin/python" python3 python}; do
    if "$candidate" -c 'import importlib.util as u, sys; sys.exit(sys.version_info < (3, 11) or not u.find_spec("jax"))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: ${PYTHON:-no Python on the PATH} is not a Python 3.11 or newer with JAX; name one: PYTHON=/path/to/python" >&2
  return 2
}

python="$(find_jax)" || exit 2
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
for wheel in "${WHEELS:-$root/.wheels}"/*.whl; do
  if [ -e "$wheel" ]; then PYTHONPATH="$PYTHONPATH:$wheel"; fi
done
export PYTHONPATH
exec "$python" -m fmjax.bench.device "$@"
