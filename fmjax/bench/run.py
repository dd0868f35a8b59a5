"""The work of `scripts/bench.py`: inspects the machine, measures the chosen workloads, prints and
stores the results.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from fmjax.bench import cold, growth, inputs, table, timing
from fmjax.bench.measure import Options, side_by_side, write
from fmjax.bench.workloads import WORKLOADS, Result, chosen
from fmjax.config.json_files import to_line
from fmjax.distributed.hosts import say
from fmjax.errors import UserError

MODULES: Result = {"data": inputs, "cold": cold, "growth": growth}


def options(args: argparse.Namespace) -> Options:
    """Returns the requested workloads and the machine's properties.

    Raises UserError for flags that request something that this machine lacks.
    """
    cores = len(os.sched_getaffinity(0))
    threads = args.threads or cores
    if not 1 <= threads <= cores:
        raise UserError(
            f"--threads={threads}: this process may use {cores} cores; choose from 1 to {cores}"
        )
    for name, value in (("rounds", args.rounds), ("seconds", args.seconds)):
        if value <= 0:
            raise UserError(f"--{name}={value}: must be above 0")
    python = args.peer_python or sys.executable
    found = {} if args.no_peer else timing.peer_versions(python)
    args.workdir.mkdir(parents=True, exist_ok=True)
    with timing.ours(
        args.workdir, 1, {"JAX_PLATFORMS": args.device} if args.device == "cpu" else None
    ) as side:
        described = side.ask("describe")
    device = "cpu" if described["platform"] == "cpu" else "gpu"
    if args.device == "gpu" and device == "cpu":
        raise UserError(
            "--device=gpu: JAX finds no GPU here; pip install -e '.[cuda]', or omit --device"
        )
    if not found and not args.no_peer:
        say(timing.PEER_ABSENT)
    return Options(
        workdir=args.workdir,
        threads=threads,
        rounds=args.rounds,
        seconds=args.seconds,
        device=device,
        described=described,
        python=python,
        peer=found,
        compiled=not args.no_compile,
        tiny=args.tiny,
        profile=args.profile,
    )


def bench(args: argparse.Namespace) -> None:
    """Measures the named workloads, or all, one after the other. Prints one table per group."""
    names = chosen(args.names)
    asked = options(args)
    results: Result = {}
    for name in names:
        begun = time.perf_counter()
        result = side_by_side(name, asked) if name in WORKLOADS else MODULES[name].measure(asked)
        results[name] = result
        path = write(name, result, asked)
        say(f"{name}: {time.perf_counter() - begun:.0f} s, {path}")
        if name == "growth":
            say(f"growth: {growth.write_plot(result, asked.workdir)}")
    if args.json:
        print(to_line(results))
        return
    if rows := [result for name, result in results.items() if name in WORKLOADS]:
        print(table.side_by_side(rows))
    for name in names:
        if name in MODULES:
            print(f"\n{name}\n{MODULES[name].table(results[name])}")
    print("\n" + table.where(results[names[-1]]["machine"]))
