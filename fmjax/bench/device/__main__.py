"""Checks fmjax on this machine's GPU or TPU: kernels, parity, speed, memory, a profile. Prints one
table.

    bash scripts/device_check.sh                      # 9 minutes at most
    bash scripts/device_check.sh --rehearse           # tiny sizes on the CPU

Needs JAX, Flax, Optax and Orbax, and installs nothing. With torch and transformers in the same
Python, it also compares outputs and speed with theirs. Exit code 0 if every check of kernels and of
parity that ran holds (in a rehearsal: if nothing failed), 1 if not, 2 for a mistake in the command.
"""

from __future__ import annotations

import datetime
import sys
from argparse import Namespace
from pathlib import Path

from fmjax.bench.device import run
from fmjax.config import commandline
from fmjax.errors import in_range, one_of


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = commandline.Flags(__doc__)
    flags.add("--rehearse", action="store_true", help="run everything with tiny sizes on the CPU")
    flags.add(
        "--out",
        type=Path,
        help="folder for device_check.json, the table, the log and the trace "
        "(default: a new one in runs/)",
    )
    flags.add(
        "--minutes", type=float, help="time limit of the whole (default: 9; of a rehearsal: 6)"
    )
    flags.add(
        "--only",
        nargs="+",
        default=[],
        metavar="PART",
        help=f"run these parts alone, of {', '.join(run.CHOICES[1:])}",
    )
    held = True

    def checked(args: Namespace) -> None:
        nonlocal held
        minutes = args.minutes if args.minutes is not None else 6.0 if args.rehearse else 9.0
        in_range("--minutes", minutes, least=0.5, most=60)
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        out = args.out or Path("runs") / f"device_check-{now}"
        for part in args.only:
            one_of("--only", part, run.CHOICES)
        held = run.check(out, minutes, args.rehearse, args.only)

    return commandline.run(flags, checked, argv) or int(not held)


if __name__ == "__main__":
    sys.exit(main())
