"""The command that prepares a corpus: its flags and messages."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from fmjax.config.commandline import Flags
from fmjax.data.sources.lines import RECORDS
from fmjax.distributed.hosts import say
from fmjax.errors import UserError
from fmjax.prepare import report as reports


def add_flags(flags: Flags) -> None:
    """Adds the flags that `prepare` reads."""
    add_input(flags)
    add_result(flags)
    add_execution(flags)


def add_input(flags: Flags) -> None:
    """Adds the flags about input and output."""
    flags.add(
        "--input", required=True, help="a file, several joined by commas, a glob, or a folder"
    )
    flags.add(
        "--output", type=Path, required=True, help="the folder to write: new, or one to continue"
    )
    flags.add(
        "--source",
        default="auto",
        help="text, jsonl, csv, tsv or parquet (default: by file extension)",
    )
    flags.add(
        "--column",
        default="text",
        help="the column of the text, in files that have columns (default: text)",
    )
    flags.add(
        "--record",
        choices=RECORDS,
        default="paragraph",
        help="the unit of a document in text files (default: paragraph)",
    )


def add_result(flags: Flags) -> None:
    """Adds the flags that affect the result: filters, deduplication, tokenizer, shards."""
    flags.add(
        "--filters",
        default="gopher_repetition,gopher_quality",
        help='a,b or {"a": {"option": 1}} or none',
    )
    flags.add(
        "--dedup",
        default="exact,minhash",
        help='exact,minhash or {"minhash": {"num_buckets": 20}} or none',
    )
    flags.add(
        "--language",
        default="en",
        help="language of the text; only en uses the rules for English words",
    )
    flags.add(
        "--tokenizer",
        type=Path,
        help="a folder or file; also writes the tokens, so that training need not tokenize",
    )
    flags.add(
        "--shards",
        type=int,
        default=0,
        help="number of files to write (default: one per input file, at most 1000)",
    )


def add_execution(flags: Flags) -> None:
    """Adds the flags about execution."""
    flags.add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="number of tasks to run at a time (default: one per core)",
    )
    flags.add(
        "--executor",
        choices=("local", "slurm", "ray"),
        default="local",
        help="where tasks run (default: local)",
    )
    flags.add("--slurm", default="{}", help="options of datatrove's SlurmPipelineExecutor, as JSON")


def prepare(args: Namespace) -> None:
    """Prepares a corpus according to the flags, and prints its report.

    Raises UserError if datatrove is not installed, and as `run.prepare` does.
    """
    try:
        from fmjax.prepare import run
    except ImportError as error:
        if (error.name or "").startswith("fmjax"):
            raise
        fix = "in fmjax's checkout, pip install -e '.[prepare]'"
        raise UserError(f"preparing data needs datatrove ({error}); {fix}") from error
    report = run.prepare(args, say)
    if report is None:
        say("submitted to Slurm; run the same command again for the report")
    else:
        print(reports.table(report))
