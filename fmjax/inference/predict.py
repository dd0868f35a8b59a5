"""Predictions for a file of examples.

Each example gets one line, in the order of the file. Until all are written, the lines are in
`OUTPUT.partial`, which the same command continues; `OUTPUT.partial.json` describes the prediction.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fmjax.config.json_files import read_json, write_json
from fmjax.contracts import Config, Value
from fmjax.data.storage.cache import digest
from fmjax.distributed.hosts import say
from fmjax.distributed.progress import Bar
from fmjax.errors import Interrupted, UserError, one_line
from fmjax.filesystems.buckets import BucketPath
from fmjax.filesystems.paths import RunPath
from fmjax.inference.inputs import (
    AUTO,
    STANDARD,
    Example,
    column_names,
    finite,
    open_inputs,
    with_names,
)
from fmjax.inference.load import load
from fmjax.inference.predicting import Predictor
from fmjax.inference.pretrained import Pretrained


class Output:
    """The destination of answers: a file that appears when it is complete, or a pipe.

    Attributes:
      target: the file; "-" is standard output.
      done: the number of answers that an interrupted prediction has written.
      failed: the number of answers that are errors.
      first_error: the first of these errors.
    """

    def __init__(self, target: Path):
        # If output is redirected to a file, /dev/stdout is that file, which already exists.
        target = Path(STANDARD) if target == Path("/dev/stdout") else target
        self.target = target
        self.name = "standard output" if str(target) == STANDARD else str(target)
        self.is_pipe = str(target) == STANDARD or (target.exists() and not target.is_file())
        self.partial = target.with_name(f"{target.name}.partial")
        self.about = target.with_name(f"{target.name}.partial.json")
        self.done = self.failed = 0
        self.first_error = ""
        if self.is_pipe and target.is_dir():
            raise UserError(f"--output={target}: is a folder; name a file in it")
        if not self.is_pipe and target.exists():
            raise UserError(f"--output={target}: already exists; name another file, or delete it")
        if not self.is_pipe and not target.parent.is_dir():
            raise UserError(
                f"--output={target}: cannot be written (no folder {target.parent}); create the "
                "folder, or name another file"
            )

    def find_done(self, about: Config) -> None:
        """Counts the answers of an interrupted prediction; `about` describes the current one.

        Raises UserError if the interrupted prediction was a different one.
        """
        if self.is_pipe or not self.partial.exists():
            return
        before = read_json(self.about, "no such file") if self.about.exists() else {}
        if changed := [name for name, value in about.items() if before.get(name) != value]:
            raise UserError(
                f"{self.partial}: holds the answers of an interrupted prediction whose "
                f"{' and '.join(changed)} differ; run that command again to finish it, name "
                "another --output, or delete the file"
            )
        size = 0
        for line in self.partial.read_bytes().split(b"\n")[:-1]:
            try:
                self.count(json.loads(line))
            except ValueError:
                raise UserError(f"{self.partial}: is damaged; delete it") from None
            size += len(line) + 1
        os.truncate(self.partial, size)  # a kill may have truncated the last line
        if self.done:
            say(f"continuing {self.partial}: {self.done} answers are already there")

    def count(self, answer: Mapping[str, Value]) -> None:
        self.done += 1
        if "error" in answer:
            self.failed += 1
            self.first_error = self.first_error or answer["error"]

    @contextmanager
    def opened(self, about: Config) -> Iterator[BinaryIO]:
        """Opens it for the missing answers. Raises UserError if it cannot be written."""
        try:
            if str(self.target) == STANDARD:
                yield sys.stdout.buffer
                sys.stdout.buffer.flush()
            elif self.is_pipe:
                with open(self.target, "wb") as file:
                    yield file
            else:
                write_json(self.about, about)
                with open(self.partial, "ab") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UserError(
                f"--output={self.target}: cannot be written ({error.strerror}); the answers so far "
                "are kept; run the same command again to continue"
            ) from None

    def finish(self, keep: bool) -> None:
        """Moves the file to its final name, or removes it if no example has an answer."""
        if self.is_pipe:
            return
        if keep:
            os.replace(self.partial, self.target)
        self.partial.unlink(missing_ok=True)
        self.about.unlink(missing_ok=True)


def predict_file(
    folder: RunPath,
    source: Path,
    target: Path,
    kind: str = AUTO,
    column: str = "",
    header: Sequence[str] = (),
    seed: int | None = None,
    settings: Mapping[str, Value] | None = None,
) -> None:
    """Writes one line per example of a file: its location, its id if any, the example, and the
    answer or the error.

    Args:
      folder: a run, a Hugging Face folder or a checkpoint of llama2.c.
      source: the file; "-" is standard input.
      target: the file to write; "-" is standard output. It appears when it is complete.
      kind: the format of the file; by default inferred from its extension.
      column: the file's name of the column that the task reads; see `column_names`.
      header: the names of the columns of a CSV or TSV file without a header.
      seed: the seed of sampling.
      settings: generation settings, as for `Pretrained.predict`.

    Raises UserError if the input cannot be read, the target already exists, or, after everything is
    written, if an example has no answer.
    """
    output = Output(target)
    opened = open_inputs(source, kind, header)
    model = load(folder)
    settings = {name: value for name, value in (settings or {}).items() if value is not None}
    plain = model.predictor((), seed, settings)
    names = column_names(column, plain.task.input_columns)
    inputs = opened.reading(list(names.values()))
    values = (value_or_error(inputs[index], names) for index in range(len(inputs)))
    predictor = model.predictor(values, seed, settings)
    about: Config = {
        "input": digest(inputs.path)["sha256"],
        "model": identity(folder, model),
        "columns": [names, *header],
        "settings": {"seed": seed, **settings},
    }
    output.find_done(about)
    try:
        with output.opened(about) as file, Bar("predict", len(inputs), output.done) as bar:
            for begin in range(output.done, len(inputs), predictor.chunk):
                rows = range(begin, min(begin + predictor.chunk, len(inputs)))
                for answer in answered(predictor, [inputs[row] for row in rows], names, begin):
                    file.write(json_line(answer))
                    output.count(answer)
                file.flush()
                bar.advance(output.done)
    except KeyboardInterrupt:
        written = f"; {output.partial} has them" if output.done else ""
        kept = "" if output.is_pipe else f"{written}; run the same command again to continue"
        raise Interrupted(f"{output.done} of {len(inputs)} examples are answered{kept}") from None
    end(output, len(inputs))


def end(output: Output, count: int) -> None:
    """Moves the answers to their final place, and prints their number.

    Raises UserError if an example has no answer.
    """
    output.finish(keep=output.failed < count)
    if output.failed == count:
        if count == 1:
            raise UserError(output.first_error)
        raise UserError(
            f"none of the {count} examples could be predicted, so {output.name} was not written; "
            f"the first error: {output.first_error}"
        )
    if output.failed:
        raise UserError(
            f"{output.failed} of {count} examples could not be predicted; {output.name} has their "
            f'"error" and the other {count - output.failed} answers; the first: '
            f"{output.first_error}"
        )
    say(f"{count} prediction{'' if count == 1 else 's'} written to {output.name}")


def answered(
    predictor: Predictor, examples: Sequence[Example], names: Mapping[str, str], first: int
) -> Iterator[Config]:
    """Yields the output line of each example of a chunk, which begins at example `first`."""
    values = [value_or_error(example, names) for example in examples]
    found = predictor.answers_or_errors(values, lambda index: examples[index].where, first)
    for example, answer in zip(examples, found, strict=True):
        about: Config = dict(example.place)
        if isinstance(example.value, Mapping) and "id" in example.value:
            about["id"] = example.value["id"]
        about["input"] = example.value
        if not isinstance(answer, UserError) and finite(answer) != answer:
            answer = UserError(
                f"{example.where}: the answer is not a finite number; check the model's weights"
            )
        yield about | ({"error": one_line(answer)} if isinstance(answer, UserError) else answer)


def value_or_error(example: Example, names: Mapping[str, str]) -> Value:
    """Returns an example in the form that the task reads, or a UserError if it cannot be read."""
    try:
        return with_names(example, names)
    except UserError as error:
        return error


def json_line(answer: Config) -> bytes:
    return (json.dumps(answer, ensure_ascii=False, allow_nan=False) + "\n").encode()


def identity(folder: RunPath, model: Pretrained) -> Config:
    """Returns an identity of a model's parameters without reading them."""
    if isinstance(folder, BucketPath) or model.task is not None:
        return {"path": str(folder.resolve()), "step": model.step}
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    stats = {
        path.name: [path.stat().st_size, path.stat().st_mtime_ns]
        for path in files
        if path.is_file()
    }
    return {"path": str(folder.resolve()), "files": stats}
