"""Converts between a Hugging Face folder and a run directory, and from a checkpoint of llama2.c to the former.

python scripts/convert.py --from runs/mine --to exported         # transformers loads the result
python scripts/convert.py --from BERT_DIR --to runs/converted    # a run at step 0, to evaluate or predict with
python scripts/convert.py --from stories260K.bin --to exported   # a checkpoint of llama2.c, and the tokenizer beside it
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: a checkout need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fmjax.config import commandline
from fmjax.filesystems.paths import run_path
from fmjax.inference.convert import convert


def main(argv: list[str] | None = None) -> int:
    flags = commandline.Flags(__doc__)
    flags.add(
        "--from",
        dest="source",
        type=run_path,
        required=True,
        help="a run, also gs://BUCKET/RUN, a Hugging Face folder, or a .bin file of llama2.c",
    )
    flags.add(
        "--to",
        dest="target",
        type=run_path,
        required=True,
        help="the folder to write, in the other format",
    )
    return commandline.run(flags, lambda args: convert(args.source, args.target), argv)


if __name__ == "__main__":
    sys.exit(main())
