"""Trains a tokenizer on text files and writes it in Hugging Face's layout.

    python scripts/train_tokenizer.py --files 'books/*.txt' --kind wordpiece --vocab_size 8000 --output tokenizer
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: a checkout need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fmjax.data.tokenizers import KINDS, train_tokenizer_files

from fmjax import commandline


def main(argv: list[str] | None = None) -> int:
    flags = commandline.Flags(__doc__)
    flags.add("--files", required=True, help="a file, a list with commas, a glob, or a folder")
    flags.add("--column", default="text", help="the column of the text, in files that have columns (default: text)")
    flags.add("--kind", choices=KINDS, default="wordpiece", help="the kind of tokenizer (default: wordpiece)")
    flags.add("--vocab_size", type=int, default=8000, help="the number of pieces, special ones included (default: 8000)")
    flags.add("--keep_case", action="store_true", help="tell capital letters from small ones")
    flags.add("--output", type=Path, required=True, help="the folder to write; it must not be there yet, or be empty")
    return commandline.run(flags, train_tokenizer_files, argv)


if __name__ == "__main__":
    sys.exit(main())
