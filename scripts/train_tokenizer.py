"""Trains a tokenizer on text files and writes it in Hugging Face's format.

python scripts/train_tokenizer.py --files 'books/*.txt' --kind wordpiece --vocab_size 8000 --output tokenizer
"""

import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: a checkout need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fmjax.config import commandline
from fmjax.data.kinds.text import texts
from fmjax.data.sources.open import check_columns, open_source
from fmjax.data.tokenizers.tokenizer import train_tokenizer
from fmjax.distributed.hosts import say
from fmjax.errors import UserError

KINDS = ("wordpiece", "bpe", "unigram", "t5", "word", "char", "byte")


def train(args: Any) -> None:
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output={args.output}: is a file, not a folder; name a new folder")
    if args.output.exists() and any(args.output.iterdir()):
        raise UserError(f"--output={args.output}: is not empty; name a new folder")
    source = open_source("auto", args.files, split="train")
    check_columns(source, (args.column,))
    tokenizer = train_tokenizer(
        texts(source, args.column), args.kind, args.vocab_size, lowercase=not args.keep_case
    )
    tokenizer.save(args.output)
    say(
        f"{args.output} has a {args.kind} tokenizer with {tokenizer.vocab_size} pieces, trained "
        f"on {len(source):,} records"
    )


def main(argv: list[str] | None = None) -> int:
    flags = commandline.Flags(__doc__)
    flags.add("--files", required=True, help="a file, several joined by commas, a glob or a folder")
    flags.add(
        "--column",
        default="text",
        help="the column of the text, in files that have columns (default: text)",
    )
    flags.add(
        "--kind",
        choices=KINDS,
        default="wordpiece",
        help="the kind of tokenizer (default: wordpiece)",
    )
    flags.add(
        "--vocab_size",
        type=int,
        default=8000,
        help="the number of pieces, including special ones (default: 8000)",
    )
    flags.add("--keep_case", action="store_true", help="keep upper and lower case distinct")
    flags.add("--output", type=Path, required=True, help="the folder to write: new or empty")
    return commandline.run(flags, train, argv)


if __name__ == "__main__":
    sys.exit(main())
