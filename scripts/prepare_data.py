"""Turns raw text into a corpus: filters it, removes duplicates and near-duplicates, writes ArrayRecord shards and a report.

    python scripts/prepare_data.py --input 'crawl/*.jsonl.gz' --output corpus --tokenizer tokenizer --workers 16
    python scripts/train.py --config configs/gpt_clm.py --config.data.files.train=corpus ...

The engine is datatrove: in fmjax's checkout, pip install -e '.[prepare]'. Tasks share the files, and the same command
continues where one was stopped. It reads text, JSON lines, CSV, TSV and Parquet, compressed or not. On Slurm: --executor
slurm --slurm '{"partition": "cpu", "time": "10:00:00"}', then the same command again for the report.
"""

import os
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: a checkout need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fmjax.config import commandline
from fmjax.data.sources.lines import RECORDS
from fmjax.distributed.hosts import say
from fmjax.errors import UserError
from fmjax.prepare import report as reports


def prepare(args: Any) -> None:
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


def main(argv: list[str] | None = None) -> int:
    flags = commandline.Flags(__doc__)
    flags.add(
        "--input", required=True, help="a file, several joined by commas, a glob, or a folder"
    )
    flags.add(
        "--output", type=Path, required=True, help="the folder to write: new, or one to go on with"
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
        help="what is a document in text files (default: paragraph)",
    )
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
        help="for other languages than en, the rules for English words are left out",
    )
    flags.add(
        "--tokenizer",
        type=Path,
        help="a folder or file: counts tokens and stores their ids beside the texts",
    )
    flags.add(
        "--shards",
        type=int,
        default=0,
        help="how many files to write (default: one per input file, at most 1000)",
    )
    flags.add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="tasks at a time (default: one per core)",
    )
    flags.add(
        "--executor",
        choices=("local", "slurm", "ray"),
        default="local",
        help="where tasks run (default: local)",
    )
    flags.add("--slurm", default="{}", help="options of datatrove's SlurmPipelineExecutor, as JSON")
    return commandline.run(flags, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
