"""Predicts with a run or a Hugging Face folder: one line of output for each example of a file.

    python scripts/predict.py --workdir runs/mine --input texts.txt --output answers.jsonl
    python scripts/predict.py --workdir runs/mine --input reviews.csv --column review --output answers.jsonl
    python scripts/predict.py --workdir runs/gpt --input prompts.txt --output stories.jsonl \\
        --max_new_tokens 100 --temperature 0.8 --seed 1
    echo "The dog" | python scripts/predict.py --workdir runs/gpt --source text --input - --output -

Input: .txt has a text per line; .jsonl a JSON string or an object per line, such as {"text": "..."} with the columns that the
model reads; .csv, .tsv, .parquet and .arrow have such columns. For masked language modeling the text has mask tokens. The
settings of generation are by default those of the run or of the folder's generation_config.json.

Output: a JSON object per line, in the order of the input, with "line" (where it was), "id" (if the example has one), "input" and
the answer, or "error" if the example could not be read; the exit code is then 2. An interrupted prediction is continued by the
same command. In Python: fmjax.load("runs/mine").predict(["..."]).
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: a checkout need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fmjax.config import commandline
from fmjax.data.storage import cache
from fmjax.filesystems.paths import local_path, run_path
from fmjax.inference import predicting
from fmjax.inference.inputs import AUTO, KINDS
from fmjax.inference.predict import predict_file


def main(argv: list[str] | None = None) -> int:
    flags = commandline.Flags(__doc__)
    flags.add(
        "--workdir",
        type=run_path,
        required=True,
        help="a run, also gs://BUCKET/RUN, a Hugging Face folder or a .bin of llama2.c",
    )
    flags.add("--input", type=Path, required=True, help="the file of examples; - is standard input")
    flags.add(
        "--output",
        type=local_path,
        required=True,
        help="the .jsonl file to write, a new one; - is standard output",
    )
    flags.add(
        "--source",
        choices=(AUTO, *KINDS),
        default=AUTO,
        help="what the input is (default: by file extension)",
    )
    flags.add(
        "--column",
        default="",
        help="the column to read; of several: question=COLUMN,context=COLUMN",
    )
    flags.add(
        "--header",
        default="",
        help="the names of the columns, text,label, of a csv or tsv file without a header",
    )
    flags.add("--verify", action="store_true", help=cache.VERIFY)
    predicting.add_flags(flags)
    return commandline.run(flags, predict, argv)


def predict(args: argparse.Namespace) -> None:
    settings = {name: vars(args)[name] for name in predicting.FLAGS}
    header = tuple(name.strip() for name in args.header.split(",") if name.strip())
    with cache.verifying(args.verify):
        predict_file(
            args.workdir,
            args.input,
            args.output,
            args.source,
            args.column,
            header,
            args.seed,
            settings,
        )


if __name__ == "__main__":
    sys.exit(main())
