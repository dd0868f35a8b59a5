"""The command `scripts/reproduce.py`: chooses experiments, runs them, and shows the verdicts."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import jax

from fmjax.config.shipped import shipped_folder
from fmjax.errors import Diverged, UserError, one_line
from fmjax.examples.compiled import compiled_programs
from fmjax.experiments import pages, recording
from fmjax.experiments.entries import Claims, Experiment, claims_file, data_of, read_claims
from fmjax.experiments.reproduce import Options, Runner
from fmjax.experiments.verdicts import NOT_RUN, Rows, Verdict, number, verdicts
from fmjax.filesystems.paths import local_path

FULL, SHRUNKEN = "runs/reproduce", "runs/reproduce-quick"


def reproduce(args: argparse.Namespace) -> list[str]:
    """Does what the flags say; returns the names of the experiments with a claim that fails.

    Raises UserError, before anything is run, for flags that do not fit together, an unknown name,
    data or weights that are not there, and files that cannot be written.
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
    options = Options(workdir_of(args, chosen), folder(args.data), args.quick, args.download)
    record = path if args.record or args.record_worse else None
    if record:
        recording.head(record)
        check_writable(record.parent, str(record))
        check_pages(shipped_folder().parent)
    with compiled_programs(small=True) if args.quick else nullcontext():
        return run_all(chosen, claims, options, record, args.record_worse)


def choose(args: argparse.Namespace, claims: Claims) -> list[Experiment]:
    """Returns the experiments that the flags choose; raises UserError if they choose none."""
    if args.list or args.write:
        return []
    if bool(args.names) == args.all:
        raise UserError("name experiments, or --all; --list shows their names")
    if (args.record or args.record_worse) and args.quick:
        raise UserError("--record would write the results of shrunken runs; leave out --quick")
    names = claims.experiments if args.all else dict.fromkeys(args.names)
    return [claims.named(name) for name in names]


def folder(text: str | None) -> Path | None:
    """Returns the local folder that a flag names. Raises UserError for an address."""
    return local_path(text).expanduser() if text else None


def workdir_of(args: argparse.Namespace, chosen: list[Experiment]) -> Path:
    """Returns the folder of all experiments.

    Shrunken runs start anew each time, in a folder of their own. Raises UserError if they would be
    mixed with earlier runs, or if the folder cannot be written.
    """
    given = folder(args.workdir)
    workdir = given or Path(SHRUNKEN if args.quick else FULL)
    check_writable(workdir, f"--workdir={workdir}")
    if args.quick and given is None:
        shutil.rmtree(workdir, ignore_errors=True)
    for one in chosen if args.quick else ():
        if (workdir / one.name).exists():
            raise UserError(
                f"{workdir / one.name}: there are runs already, and --quick starts anew; name a "
                "new --workdir"
            )
    return workdir


def check_writable(path: Path, name: str) -> None:
    """Raises UserError, with a name for it, if files cannot be written to a folder that exists or
    is to be created."""
    place = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"{name}: cannot be written, since {place} is no folder that you may write to; fix its "
            "permissions, or name another"
        )


def check_pages(root: Path) -> None:
    """Raises UserError if a page is not there or cannot be written."""
    for page in pages.page_files(root):
        check_writable(page.parent, str(page))


def run_all(
    chosen: list[Experiment], claims: Claims, options: Options, record: Path | None, worse: bool
) -> list[str]:
    """Runs experiments; returns the names of those with a claim that fails.

    Writes what was measured of each into the file `record`, if there is one, and the pages; where
    a claim fails, only if `worse`.
    """
    runners = [Runner(one, claims, options) for one in chosen]
    for runner in runners:
        runner.check()
    failed = []
    for one, runner in zip(chosen, runners, strict=True):
        try:
            found = runner.run()
        except Diverged as error:
            print(f"error: {one.name}: {one_line(error)}", file=sys.stderr, flush=True)
            failed.append(one.name)
            continue
        claimed = claims.measured.get(one.name, {})
        judged = pages.report(one, claimed, found, runner.folder, options.quick)
        show(one, judged, found)
        print(runner.folder / "report.html", flush=True)
        failing = any(verdict.holds is False for verdict in judged)
        if failing:
            failed.append(one.name)
        if record and failing and not worse:
            print(f"{one.name}: not recorded, since a claim fails; --record-worse records it")
        elif record:
            with recording.locked(record):
                write(recording.record(record, one.name, found))
        jax.clear_caches()
    return failed


def show(one: Experiment, judged: list[Verdict], found: Rows) -> None:
    """Prints the verdicts on an experiment, and where it was measured."""
    print(f"\n{one.title}")
    print(pages.text_table(pages.HEAD, (pages.cells(verdict, found) for verdict in judged)))
    for machine in dict.fromkeys(row.machine for row in found.values()):
        print(f"measured on {machine}")


def write(claims: Claims) -> None:
    """Writes the tables of the pages from the claims. Raises UserError if that is not possible."""
    root = shipped_folder().parent
    check_pages(root)
    changed = pages.write_pages(claims, root)
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
