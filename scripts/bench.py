"""Measures fmjax side by side with the usual alternative, transformers and torch, at their fastest
setting.

    python scripts/bench.py                          # the whole table
    python scripts/bench.py bert_train t5_greedy     # some rows of it; --list names them all
    python scripts/bench.py growth                   # step time and memory over sizes: a table and bench/growth.svg
    python scripts/bench.py bert_mlm --profile TRACES --no_peer

Both sides have the same weights, batches, dropout, optimizer, dtype and threads. Each runs in its
own process. Losses over 20 steps are compared before anything is timed; then the sides run in turn,
A B B A. Results go to WORKDIR/bench/*.json. On a GPU, sizes are larger and matrix products run in
bf16. The peer needs torch and transformers, in this Python or in that of --peer_python.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: a checkout need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fmjax.bench.run import bench
from fmjax.bench.workloads import listing
from fmjax.config import commandline


def main(argv: list[str] | None = None) -> int:
    flags = commandline.Flags(__doc__)
    flags.add(
        "names", nargs="*", metavar="WORKLOAD", help="what to measure (default: the whole table)"
    )
    flags.add("--list", action="store_true", help="list the workloads, and exit")
    flags.add(
        "--workdir",
        type=Path,
        default=Path("runs/bench"),
        help="folder for results, jobs and logs (default: runs/bench)",
    )
    flags.add("--json", action="store_true", help="print one JSON object instead of tables")
    flags.add(
        "--profile",
        type=Path,
        help="folder for traces of fmjax's steps, for TensorBoard or Perfetto",
    )
    flags.add(
        "--threads", type=int, default=0, help="cores for each side (default: 0, which means all)"
    )
    flags.add(
        "--rounds", type=int, default=1, help="rounds of A B B A; more rounds narrow the range"
    )
    flags.add("--seconds", type=float, default=1.0, help="approximate seconds per run")
    flags.add(
        "--device",
        choices=("cpu", "gpu"),
        help="the device to measure on (default: what JAX finds)",
    )
    flags.add(
        "--peer_python",
        help="the Python interpreter that has torch and transformers (default: this one)",
    )
    flags.add("--no_peer", action="store_true", help="measure only fmjax")
    flags.add(
        "--no_compile",
        action="store_true",
        help="do not measure torch.compile, which is often the peer's best",
    )
    flags.add(
        "--tiny", action="store_true", help="use tiny models: shows that it runs, not how fast"
    )
    return commandline.run(flags, lambda args: print(listing()) if args.list else bench(args), argv)


if __name__ == "__main__":
    sys.exit(main())
