#!/usr/bin/env bash
# Trains on the nodes of a Slurm cluster, with one process per node that uses all of its GPUs.
#
#   sbatch --nodes=4 --gpus-per-node=8 scripts/slurm.sh --config configs/scale.py:bert_large --workdir /shared/run
#
# The arguments are those of train.py. The processes find each other automatically. Two minutes before the time limit, Slurm
# sends SIGTERM; the run saves and exits with code 75, and the job is requeued to continue from there.
#SBATCH --job-name=fmjax
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# Slurm runs a copy of this file; the checkout is where it was submitted, or FMJAX.
cd "${FMJAX:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}"
python="${PYTHON:-.venv/bin/python}"
if [ "${1:-}" = "--dry-run" ]; then
  shift
  printf '%q ' srun --kill-on-bad-exit=1 "$python" scripts/train.py --distributed "$@"
  echo
  exit
fi
code=0
srun --kill-on-bad-exit=1 "$python" scripts/train.py --distributed "$@" || code=$?
if [ "$code" = 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
