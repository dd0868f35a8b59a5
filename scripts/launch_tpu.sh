#!/usr/bin/env bash
# Starts a command of fmjax on every worker of a Cloud TPU VM, and shows the output.
#
#   scripts/launch_tpu.sh --tpu NAME --zone ZONE [--project P] [--checkout DIR] [--install] [--dry-run] -- \
#       python scripts/train.py --config configs/scale.py:bert_large --workdir gs://BUCKET/RUN --distributed
#
# --checkout is the folder of fmjax on the workers (default: fmjax, in the home folder); --install first copies this checkout
# there and installs it with its TPU extra. --dry-run prints the commands without running them. The workers find each
# other automatically (--distributed). Stopping this script leaves them running: run it with the command
# `pkill -TERM -f scripts/train.py` to make them save and exit.
set -euo pipefail

usage() { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }
fail() { echo "error: $1" >&2; exit 2; }

tpu="" zone="" project="" checkout="fmjax" install="" dry=""
while [ $# -gt 0 ]; do
  case "$1" in
    --tpu | --zone | --project | --checkout)
      [ $# -ge 2 ] || fail "$1 has no value; write $1 VALUE"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --install) install=1; shift ;;
    --dry-run) dry=1; shift ;;
    --) shift; break ;;
    -h | --help) usage ;;
    *) fail "$1: no such flag; choose from --tpu, --zone, --project, --checkout, --install, --dry-run" ;;
  esac
done
[ -n "$tpu" ] || fail "--tpu is missing; pass the name of the TPU VM (gcloud compute tpus tpu-vm list)"
[ -n "$zone" ] || fail "--zone is missing; pass the zone of the TPU VM, such as us-central2-b"
[ $# -gt 0 ] || fail "there is no command; write it behind --"

run() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
where=(--zone "$zone" --worker=all)
[ -z "$project" ] || where+=(--project "$project")
printf -v folder '%q' "$checkout"

if [ -n "$install" ]; then
  here="$(cd "$(dirname "$0")/.." && pwd)"
  archive="$(mktemp --suffix=.tar.gz)"
  trap 'rm -f "$archive"' EXIT
  git -C "$here" archive --format=tar.gz -o "$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$tpu:fmjax.tar.gz" "${where[@]}"
  run gcloud compute tpus tpu-vm ssh "$tpu" "${where[@]}" --command \
    "mkdir -p $folder && tar -xzf fmjax.tar.gz -C $folder && cd $folder && python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu,gcs]'"
fi
command="$(printf '%q ' "$@")"
run gcloud compute tpus tpu-vm ssh "$tpu" "${where[@]}" --command "cd $folder && PATH=\$PWD/.venv/bin:\$PATH $command"
