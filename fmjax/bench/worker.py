"""The process of a side: reads one JSON request per line and answers with one JSON object. Imports
no array library.

A pass takes every batch of the job once. Both sides pass NumPy arrays at each step and wait for the
last result."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fmjax.bench.workloads import Result
from fmjax.memory import keep_freed


def pin(threads: int) -> None:
    """Pins this process to a number of its allowed cores, and makes it keep freed memory, as
    fmjax's scripts do; both make either side faster. Call this before an array library starts its
    threads."""
    keep_freed()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)


def read_job(folder: Path, side: str) -> tuple[Result, list[dict[str, np.ndarray]]]:
    """Returns the description of a job and the batches of a side."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    batches: list[dict[str, np.ndarray]] = [{} for _ in range(job["batches"])]
    with np.load(folder / "batches.npz") as arrays:
        for key in arrays.files:
            whose, index, name = key.split("/")
            if whose == side:
                batches[int(index)][name] = arrays[key]
    return job, batches


def losses(worker: Any, steps: int) -> Result:
    """Takes steps and returns their results: a loss; for inference and generation, the sums of
    arrays and the tokens.
    """
    return {"results": [worker.wait(worker.step(index)) for index in range(steps)]}


def run(worker: Any, passes: int, count: int) -> dict[str, float]:
    """Takes `passes` passes over `count` batches. Returns the wall-clock and CPU seconds of this
    process."""
    begun, spent = time.perf_counter(), time.process_time()
    result = None
    for index in range(passes * count):
        result = worker.step(index)
    worker.wait(result)
    return {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - spent}


COMMON: dict[str, Callable[..., Result]] = {"losses": losses, "run": run}


def serve(make: Callable[[], Any]) -> None:
    """Answers calls until the pipe is closed. Whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker: Any = None
    for line in sys.stdin:
        call = json.loads(line)
        name = call.pop("do")
        try:
            worker = worker or make()
            function = COMMON.get(name)
            reply = function(worker, **call) if function else getattr(worker, name)(**call)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
