"""Turns raw text into a corpus: filters it, removes duplicates and near-duplicates, writes ArrayRecord shards and a report.

    python scripts/prepare_data.py --input 'crawl/*.jsonl.gz' --output corpus --tokenizer tokenizer --workers 16
    python scripts/train.py --config configs/gpt_clm.py --config.data.files.train=corpus ...

The engine is datatrove: in fmjax's checkout, pip install -e '.[prepare]'. Tasks share the files, and the same command
continues where one was stopped. It reads text, JSON lines, CSV, TSV and Parquet, compressed or not. On Slurm: --executor
slurm --slurm '{"partition": "cpu", "time": "10:00:00"}', then the same command again for the report.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: a checkout need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fmjax.config import commandline
from fmjax.prepare import command


def main(argv: list[str] | None = None) -> int:
    flags = commandline.Flags(__doc__)
    command.add_flags(flags)
    return commandline.run(flags, command.prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
