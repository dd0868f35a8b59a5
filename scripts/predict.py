"""Predicts with a run or a Hugging Face folder: reads one JSON object or string a line, writes one object a line.

    python scripts/predict.py --workdir runs/mine --input in.jsonl --output out.jsonl

An object has the task's text columns, {"text": "..."}; for masked language modelling the text has mask tokens.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: a checkout need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fmjax.config import commandline
from fmjax.inference.predict import predict_file


def main(argv: list[str] | None = None) -> int:
    flags = commandline.Flags(__doc__)
    flags.add("--workdir", type=Path, required=True, help="a run directory or a Hugging Face folder")
    flags.add("--input", type=Path, required=True, help="a .jsonl file")
    flags.add("--output", type=Path, required=True, help="the .jsonl file to write; it must not be there yet")
    return commandline.run(flags, lambda args: predict_file(args.workdir, args.input, args.output), argv)


if __name__ == "__main__":
    sys.exit(main())
