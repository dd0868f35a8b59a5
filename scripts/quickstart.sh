#!/usr/bin/env bash
# From nothing to a pretrained, fine-tuned and evaluated BERT: creates .venv, installs, and runs scripts/quickstart.py.
# Arguments go to that script: bash scripts/quickstart.sh --workdir /tmp/quickstart
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
install_fmjax
exec "$VENV/bin/python" scripts/quickstart.py "$@"
