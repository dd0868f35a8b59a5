"""Reports the resources that a config's training step needs on hardware that you do not have,
before you pay for it.

    python scripts/plan.py --config configs/scale.py:bert_large --topology v5e:4x4
    python scripts/plan.py --config configs/bert_mlm.py --topology gpu:h200
    python scripts/plan.py --config configs/bert_mlm.py --topology cpu:8 --sharding --config.mesh.rules=fsdp \\
        --config.mesh.axes='{"fsdp": -1}'

For a TPU slice, the TPU's compiler compiles the step. This needs libtpu, but no TPU: pip install
libtpu. For GPUs and CPUs, and with --analytic, the numbers come from formulas. With --json, the
last line is one JSON object.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: a checkout need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

from fmjax.config import commandline
from fmjax.config.json_files import to_line
from fmjax.planning.plan import plan
from fmjax.planning.report import sharding_table, table
from fmjax.planning.topology import read_topology
from fmjax.train import keys


def main(argv: list[str] | None = None) -> int:
    flags = commandline.Flags(__doc__, config=True, keys=keys.describe)
    flags.add(
        "--topology",
        required=True,
        help="v5e:4x4, v5p:4x4x8, v6e:4x4:2 (two slices), gpu:h200:8, cpu:8",
    )
    flags.add(
        "--sharding",
        action="store_true",
        help="show every parameter: shape, logical axes, mesh axes, bytes per device",
    )
    flags.add("--analytic", action="store_true", help="estimate by formula, and compile nothing")
    flags.add("--json", action="store_true", help="print one JSON object")
    return commandline.run(flags, show, argv)


def show(args: argparse.Namespace) -> None:
    """Prints the plan."""
    jax.config.update("jax_platforms", "cpu")
    topology, config = read_topology(args.topology), commandline.load(args)
    if args.sharding:
        print(sharding_table(config, topology, as_json=args.json))
        return
    result = plan(config, topology, compiled=not args.analytic)
    print(to_line(result) if args.json else table(result))


if __name__ == "__main__":
    sys.exit(main())
