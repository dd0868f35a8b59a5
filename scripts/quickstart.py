"""Pretrains, fine-tunes and evaluates a small BERT on the English that ships with Python, and prints one table.

    python scripts/quickstart.py --workdir runs/quickstart

Three minutes on two CPU cores; with --full, a longer pretraining and three seeds, six.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: a checkout need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fmjax.config import commandline
from fmjax.examples.quickstart import quickstart


def main(argv: list[str] | None = None) -> int:
    flags = commandline.Flags(__doc__)
    flags.add(
        "--workdir",
        type=Path,
        help="folder for the runs (default: runs/quickstart, or runs/quickstart-full with --full)",
    )
    flags.add(
        "--full",
        action="store_true",
        help="pretrain for 2,800 steps and fine-tune with three seeds: the README's table",
    )
    flags.add(
        "--seeds",
        type=int,
        default=0,
        help="fine-tuning runs from each initialization (default: 1; 3 with --full)",
    )
    flags.add(
        "--tiny",
        action="store_true",
        help="run a few steps of a tiny model, to check that everything works",
    )
    return commandline.run(flags, start, argv)


def start(args: argparse.Namespace) -> None:
    """Runs the quickstart in the folder that the flags name, or the usual one."""
    usual = Path("runs/quickstart-full" if args.full else "runs/quickstart")
    quickstart(args.workdir or usual, args.full, args.seeds, args.tiny)


if __name__ == "__main__":
    sys.exit(main())
