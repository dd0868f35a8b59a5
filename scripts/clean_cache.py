"""Shows what is in the cache ($FMJAX_CACHE, by default ~/.cache/fmjax), and removes what is old.

python scripts/clean_cache.py                    # the bytes of each kind of file
python scripts/clean_cache.py --older_than 30    # removes what no run has used for 30 days
"""

import sys
from argparse import Namespace
from pathlib import Path

if not __package__:  # run as a file: a checkout need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fmjax.config import commandline
from fmjax.config.numbers import real
from fmjax.data.storage import cleaning
from fmjax.errors import in_range


def clean(args: Namespace) -> None:
    """Removes old entries if asked to, and prints what is there."""
    if args.older_than is not None:
        in_range("--older_than", args.older_than, least=cleaning.LEAST, most=36_500)
        done = cleaning.remove(args.older_than)
        note = f"; {done.kept:,} are in use and stay" if done.kept else ""
        note += f"; {done.failed:,} could not be removed" if done.failed else ""
        print(f"removed {done.entries:,} entries, {done.size / 1e6:,.1f} MB{note}")
    print(cleaning.table())


def main(argv: list[str] | None = None) -> int:
    flags = commandline.Flags(__doc__)
    flags.add("--older_than", type=real, help="days without use after which an entry is removed")
    return commandline.run(flags, clean, argv)


if __name__ == "__main__":
    sys.exit(main())
