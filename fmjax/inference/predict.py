"""Predictions for a file of examples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fmjax.config.json_files import open_atomically, parse_json
from fmjax.distributed.hosts import say
from fmjax.errors import UserError
from fmjax.inference.pretrained import load
from fmjax.runs.logs import Bar

CHUNK = 32


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields the number and JSON value of each line that is not blank. Raises UserError, naming it, for one that is not JSON."""
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    if line.strip():
                        yield number, parse_json(line)
                except ValueError as error:
                    raise UserError(f"{path} line {number}: is not JSON ({error}); write one object a line") from None
    except OSError as error:
        raise UserError(f"--input={path}: cannot be read ({error.strerror}); name a .jsonl file") from None
    except UnicodeDecodeError:
        raise UserError(f"--input={path}: is not UTF-8; save it as UTF-8") from None


def predict_file(folder: Path, source: Path, target: Path) -> None:
    """Writes a line of predictions for each line of `source`; `target` appears only when it is whole.

    Raises UserError if an input cannot be read, or the target is already there.
    """
    if target.exists():
        raise UserError(f"--output={target}: is already there; name another file")
    if not target.parent.is_dir():
        raise UserError(f"--output={target}: cannot be written (no folder {target.parent}); make the folder, or name another")
    lines = list(read_lines(source))
    if not lines:
        raise UserError(f"--input={source}: has no examples; give one JSON object a line")
    numbers, examples = zip(*lines, strict=True)
    model = load(folder)
    try:
        with open_atomically(target) as output, Bar("predict", len(examples)) as bar:
            for begin in range(0, len(examples), CHUNK):
                where = [f"{source} line {number}" for number in numbers[begin : begin + CHUNK]]
                for prediction in model.predict(examples[begin : begin + CHUNK], where.__getitem__, begin):
                    output.write((json.dumps(prediction, ensure_ascii=False) + "\n").encode())
                bar.advance(min(begin + CHUNK, len(examples)))
    except OSError as error:
        raise UserError(f"--output={target}: cannot be written ({error.strerror}); name another file") from None
    say(f"{len(examples)} predictions are in {target}")
