"""Pretrains, fine-tunes and evaluates a small BERT on the English that ships with Python, and prints one table.

    python scripts/quickstart.py --workdir runs/quickstart
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: a checkout need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fmjax.config import commandline
from fmjax.examples.quickstart import quickstart


def main(argv: list[str] | None = None) -> int:
    flags = commandline.Flags(__doc__)
    flags.add("--workdir", type=Path, default=Path("runs/quickstart"), help="where the runs go (default: runs/quickstart)")
    flags.add("--seeds", type=int, default=3, help="fine-tuning runs each, from pretrained and from random weights (default: 3)")
    flags.add("--tiny", action="store_true", help="a few steps of a tiny model, to see that everything works")
    return commandline.run(flags, lambda args: quickstart(args.workdir, args.seeds, args.tiny), argv)


if __name__ == "__main__":
    sys.exit(main())
