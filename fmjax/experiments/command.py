"""The command `scripts/reproduce.py`: chooses experiments, runs them, and shows the verdicts."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

import jax

from fmjax.config.shipped import shipped_folder
from fmjax.errors import UserError
from fmjax.experiments import pages
from fmjax.experiments.entries import Claims, Experiment, claims_file, data_of, read_claims
from fmjax.experiments.reproduce import Options, Runner
from fmjax.experiments.shrunken import compiled_once
from fmjax.experiments.verdicts import NOT_RUN, Rows, number, verdicts

FULL, SHRUNKEN = "runs/reproduce", "runs/reproduce-quick"


def reproduce(args: argparse.Namespace) -> list[str]:
    """Does what the flags say; returns the names of the experiments with a claim that fails.

    Raises UserError, before anything is run, for flags that do not fit together, an unknown name,
    and data or weights that are not there.
    """
    path = claims_file()
    claims = read_claims(path)
    chosen = choose(args, claims)
    if args.list:
        print(listing(claims))
        return []
    if args.write:
        write(claims)
        return []
    workdir = args.workdir or Path(SHRUNKEN if args.quick else FULL)
    options = Options(workdir, args.data, args.quick, args.download)
    with compiled_once() if args.quick else nullcontext():
        return run_all(chosen, claims, options, path if args.record else None)


def choose(args: argparse.Namespace, claims: Claims) -> list[Experiment]:
    """Returns the experiments that the flags choose; raises UserError if they choose none."""
    if args.list or args.write:
        return []
    if bool(args.names) == args.all:
        raise UserError("name experiments, or --all; --list shows their names")
    if args.record and args.quick:
        raise UserError("--record would write the results of shrunken runs; leave out --quick")
    names = claims.experiments if args.all else dict.fromkeys(args.names)
    return [claims.named(name) for name in names]


def run_all(
    chosen: list[Experiment], claims: Claims, options: Options, record: Path | None
) -> list[str]:
    """Runs experiments; returns the names of those with a claim that fails.

    Writes what was measured into the file `record`, if there is one, and the pages.
    """
    runners = [Runner(one, claims, options) for one in chosen]
    for runner in runners:
        runner.check()
    failed, measured = [], dict(claims.measured)
    for one, runner in zip(chosen, runners, strict=True):
        found = runner.run()
        claimed: Rows = found if options.quick else claims.measured.get(one.name, {})
        judged = pages.report(one, claimed, found, runner.folder)
        print(f"\n{one.title}")
        print(pages.text_table(pages.HEAD, map(pages.cells, judged)))
        print(runner.folder / "report.html", flush=True)
        if any(verdict.holds is False for verdict in judged):
            failed.append(one.name)
        measured[one.name] = found
        if record:
            order = {name: measured[name] for name in claims.experiments if name in measured}
            pages.record(record, order)
        jax.clear_caches()
    if record:
        write(read_claims(record))
    return failed


def write(claims: Claims) -> None:
    """Writes the tables of the pages from the claims."""
    changed = pages.write_pages(claims, shipped_folder().parent)
    print(f"written: {', '.join(changed)}" if changed else "all tables are as the claims say")


def listing(claims: Claims) -> str:
    """Returns a table of all experiments."""
    rows = []
    for one in claims.experiments.values():
        known = claims.measured.get(one.name, {})
        values = [
            f"{verdict.claim.metric} {number(verdict.value)}"
            if verdict.value is not None
            else NOT_RUN
            for verdict in verdicts(one, known, known)
        ]
        folders = dict.fromkeys(claims.data[name].folder for name in data_of(one, claims))
        rows.append([one.name, one.title, ", ".join(dict.fromkeys(values)), " ".join(folders)])
    return pages.text_table(("name", "experiment", "claimed", "data"), rows)
