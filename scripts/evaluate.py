"""Evaluates a run at its best step (or its newest, if none was chosen). The last line of stdout is
one JSON object.

python scripts/evaluate.py --workdir runs/mine --split test --files test.csv
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: a checkout need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fmjax.config import commandline
from fmjax.config.json_files import to_line
from fmjax.data.storage import cache
from fmjax.distributed import hosts
from fmjax.filesystems.paths import run_path
from fmjax.inference.evaluate import evaluate_run


def main(argv: list[str] | None = None) -> int:
    flags = commandline.Flags(__doc__)
    flags.add(
        "--workdir", type=run_path, required=True, help="the run directory, also gs://BUCKET/RUN"
    )
    flags.add(
        "--split", default="validation", help="the split to evaluate on (default: validation)"
    )
    flags.add("--files", help="files to evaluate on, instead of those in the config")
    flags.add("--verify", action="store_true", help=cache.VERIFY)
    hosts.add_flags(flags)
    return commandline.run(flags, show, argv)


def show(args: argparse.Namespace) -> None:
    """Evaluates, with the other hosts if there are any; the first prints."""
    hosts.join_if_asked(args)
    result = evaluate_run(args.workdir, args.split, args.files, args.verify)
    if hosts.first():
        print(to_line(result))


if __name__ == "__main__":
    sys.exit(main())
