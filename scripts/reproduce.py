"""Reproduces the results that the pages claim: trains, evaluates, computes simple baselines, and compares.

    python scripts/reproduce.py --list
    FMJAX_DATA=DATA python scripts/reproduce.py gpt-char sst2
    python scripts/reproduce.py --all --quick         # two steps of a tiny model each, without data

Run the same command again to continue; what is finished is not repeated. WORKDIR/NAME has the runs, report.html and
report.json. Exit code 1: a claim does not hold.
"""

import os
import sys
from pathlib import Path

if not __package__:  # run as a file: a checkout need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fmjax.config import commandline
from fmjax.experiments import command
from fmjax.experiments.datasets import VARIABLE


def main(argv: list[str] | None = None) -> int:
    flags = commandline.Flags(__doc__)
    flags.add("names", nargs="*", metavar="NAME", help="experiments, as --list names them")
    flags.add(
        "--list", action="store_true", help="list the experiments with what is claimed, and exit"
    )
    flags.add("--all", action="store_true", help="run all experiments")
    flags.add(
        "--quick",
        action="store_true",
        help="run two steps of tiny models, from the start, to check that everything works",
    )
    flags.add(
        "--data",
        default=os.environ.get(VARIABLE),
        help=f"the folder of the data sets (default: ${VARIABLE})",
    )
    flags.add(
        "--workdir",
        help=f"the folder of all runs (default: {command.FULL}, or {command.SHRUNKEN})",
    )
    flags.add(
        "--download", action="store_true", help="download pretrained weights that are not there"
    )
    flags.add(
        "--record",
        action="store_true",
        help="write what was measured into the claims, and the pages' tables, if all claims hold",
    )
    flags.add("--record-worse", action="store_true", help="as --record, also where a claim fails")
    flags.add(
        "--write",
        action="store_true",
        help="write the pages' tables from the claims, without running anything",
    )
    failed: list[str] = []
    code = commandline.run(flags, lambda args: failed.extend(command.reproduce(args)), argv)
    return code or (1 if failed else 0)


if __name__ == "__main__":
    sys.exit(main())
