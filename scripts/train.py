"""Trains the model of a config. Run the same command again to resume from the newest checkpoint.

    python scripts/train.py --config configs/bert_mlm.py:tiny --workdir runs/tiny
    python scripts/train.py --config configs/bert_classify.py:files --workdir runs/mine \\
        --config.init.weights=BERT_DIR --config.data.files.train=train.csv
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: a checkout need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fmjax.config import commandline, overridden_keys
from fmjax.distributed import hosts
from fmjax.filesystems.paths import local_path, run_path
from fmjax.train import keys
from fmjax.train.dry_run import dry_run
from fmjax.train.loop import train


def main(argv: list[str] | None = None) -> int:
    flags = commandline.Flags(__doc__, config=True, keys=keys.describe)
    flags.add(
        "--workdir",
        type=run_path,
        required=True,
        help="the run directory, also gs://BUCKET/RUN: new, or that of a run to continue",
    )
    flags.add(
        "--profile",
        type=local_path,
        help="folder for a trace of steps 6 to 10, for TensorBoard or Perfetto",
    )
    flags.add(
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="show the settings and one batch, without training or writing anything",
    )
    hosts.add_flags(flags)
    return commandline.run(flags, start, argv)


def start(args: argparse.Namespace) -> None:
    """Joins the other hosts, if there are any, and trains."""
    hosts.join_if_asked(args)
    given, overridden = commandline.load(args), overridden_keys(args.overrides)
    if args.dry_run:
        dry_run(given, args.workdir, overridden)
    else:
        train(given, args.workdir, profile=args.profile, overridden=overridden)


if __name__ == "__main__":
    sys.exit(main())
