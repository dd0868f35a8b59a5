#!/usr/bin/env bash
# From nothing to a pretrained, fine-tuned and evaluated BERT: makes .venv, installs, and runs scripts/quickstart.py.
# Arguments go to that script: bash scripts/quickstart.sh --workdir /tmp/quickstart
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
install_fmjax
# XLA allocates its buffers anew at each step on a CPU; huge pages save the kernel most of clearing them (1.4 x).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
exec "$VENV/bin/python" scripts/quickstart.py "$@"
