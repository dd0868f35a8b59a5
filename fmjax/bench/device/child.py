"""The process of a part: writes its rows to stdout, each as one line of JSON, as they come, and an
empty object when it is done.

python -m fmjax.bench.device.child JOB
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator

from fmjax.bench.device.job import Job, read
from fmjax.bench.device.rows import Row, failed
from fmjax.bench.workloads import Result
from fmjax.config.json_files import without_nan


def main(text: str) -> None:
    """Runs the part of a job. Whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = read(text)
    run: Callable[[Job], Iterator[Row]] = importlib.import_module(
        f"fmjax.bench.device.{job.part}"
    ).run

    def answer(said: Result) -> None:
        answers.write(json.dumps(without_nan(said)) + "\n")
        answers.flush()

    try:
        for row in run(job):
            answer(dataclasses.asdict(row))
    except Exception as error:
        traceback.print_exc()
        answer(dataclasses.asdict(failed(f"the rest of {job.name}", error)))
    answer({})


if __name__ == "__main__":
    main(sys.argv[1])
