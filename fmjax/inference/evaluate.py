"""Evaluation: a model's predictions on every example, gathered on the host, and the task's metrics
of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np

from fmjax.contracts import Arrays, Batch, Examples, Processors, PyTree, Task
from fmjax.data.kinds import text
from fmjax.data.records import ConcatenatedSources
from fmjax.data.splits import open_split
from fmjax.data.storage import cache
from fmjax.data.storage.token_store import stored_in
from fmjax.data.stream.batches import eval_batches, groups
from fmjax.data.stream.buckets import Bucketed, bucketed
from fmjax.data.stream.examples import build_examples
from fmjax.data.stream.tolerance import Tolerance
from fmjax.decoding.loop import as_generator, generate
from fmjax.decoding.settings import settings_for
from fmjax.distributed import hosts
from fmjax.distributed.hosts import say
from fmjax.distributed.progress import Bar
from fmjax.filesystems.buckets import BucketPath
from fmjax.filesystems.paths import explained, run_path
from fmjax.inference.load import load_run
from fmjax.metrics.classes import defined
from fmjax.models.sizes import with_chunks


class Collected(NamedTuple):
    """Per-example predictions of an evaluation; row i is of example i where `valid` is 1."""

    arrays: dict[str, np.ndarray]
    valid: np.ndarray  # [N]
    examples: Examples

    def metrics(self, task: Task) -> dict[str, float]:
        """Returns the task's metrics of them, without those that are undefined."""
        return defined(task.metrics(*self))


Predict = Callable[[PyTree, Mapping[str, jax.Array]], dict[str, jax.Array]]


def make_predict(model: nn.Module, task: Task, processors: Processors) -> Predict:
    """Returns the function (params, batch) -> the task's per-example predictions, without dropout;
    with what the model generates, as `generated`, if the task needs that."""

    reads = with_chunks(model, task.chunked)

    @jax.jit
    def predict(params: PyTree, batch: Batch) -> Arrays:
        outputs: PyTree = reads.apply({"params": params}, batch)
        return task.predictions(outputs, batch)

    if not task.needs_generation or task.generation is None:
        return predict
    tokenizer = processors.of(text.Processor).tokenizer
    settings, generator = settings_for(tokenizer, task.generation, model), as_generator(model)

    def both(params: PyTree, batch: Batch) -> Arrays:
        generated = generate(generator, params, batch, settings)
        return {**predict(params, batch), "generated": generated}

    return both


def evaluate(
    predict: Predict,
    task: Task,
    params: PyTree,
    batches: Iterable[Mapping[str, np.ndarray]],
    examples: Examples,
    place: Callable[[dict[str, np.ndarray]], Mapping[str, PyTree]] = dict,
    gather: Callable[[PyTree], PyTree] = jax.device_get,
) -> dict[str, float]:
    """Returns the task's metrics over all examples of the batches, which are those of `examples`,
    each counted once. Metrics that are undefined on them are left out.

    AUC, F1 and rank correlations are not sums, so predictions are gathered per example; `valid`
    marks rows that only fill up the last batch. On several hosts `place` makes global arrays of
    what each has read, and `gather` brings what is computed of them to all."""
    return collect(predict, params, batches, examples, place, gather).metrics(task)


def collect(
    predict: Predict,
    params: PyTree,
    batches: Iterable[Mapping[str, np.ndarray]],
    examples: Examples,
    place: Callable[[dict[str, np.ndarray]], Mapping[str, PyTree]] = dict,
    gather: Callable[[PyTree], PyTree] = jax.device_get,
) -> Collected:
    """Returns the predictions of all examples of the batches; see `evaluate`."""
    arrays: list[dict[str, np.ndarray]] = []
    valid: list[np.ndarray] = []
    for batch in batches:
        placed = dict(place(dict(batch)))
        real = placed.pop("valid")
        found = gather(dict(predict(params, placed)) | {"valid": real})
        valid.append(np.asarray(found.pop("valid")))
        arrays.append(found)
    gathered = {name: joined([part[name] for part in arrays]) for name in arrays[0]}
    real = np.concatenate(valid)
    if isinstance(examples, Bucketed):
        gathered, real, examples = (
            examples.restored(gathered, real),
            np.ones(len(examples), np.float32),
            examples.examples,
        )
    return Collected(gathered, real, examples)


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the rows of all parts; generated ones, as long as their batch's longest, are filled
    up with their last token.
    """
    if parts[0].ndim == 2:
        width = max(part.shape[1] for part in parts)
        parts = [np.pad(part, ((0, 0), (0, width - part.shape[1])), mode="edge") for part in parts]
    return np.concatenate(parts)


def evaluate_run(
    workdir: str | os.PathLike[str],
    split: str = "validation",
    files: str | Path | None = None,
    verify: bool = False,
) -> dict[str, PyTree]:
    """Evaluates a run on a split, or on `files` in its place; returns where and at which step, the
    metrics, of a mixture also those of each source ("books/loss"), which are `undefined` if any
    are, and how those of texts are computed.

    The parameters are those of the best step if the run keeps one, else of the newest, averaged if
    the run averages them. `verify` reads files again whose digests are remembered (`data.verify`).

    Raises UserError if the run or the data are not there.
    """
    workdir = run_path(workdir)
    with explained():
        if isinstance(workdir, BucketPath):
            workdir.check()
        loaded = load_run(workdir)
    config, task = loaded.config, loaded.task
    assert task is not None  # a run has one
    data = config["data"] | ({"files": {split: str(files)}} if files else {})
    data |= {"verify": True} if verify else {}
    tolerance = Tolerance(data.get("on_error", "fail"), tell=say)
    with tolerance.active():
        source = open_split(data, split)
    parts = source.parts if isinstance(source, ConcatenatedSources) else {}
    sources = {"": source} | {f"{name}/": part for name, part in parts.items()}
    size, length = data["batch_size"], data["max_length"]
    built: dict[str, Examples] = {}
    for name, one in sources.items():
        with stored_in(data.get("store")), cache.verifying(bool(data.get("verify"))):
            examples = build_examples(task, one, loaded.processors, length, False, tolerance)[1]
        built[name] = bucketed(examples, data.get("buckets") or (), length, size)
    size, rows, gather = share(size)
    predict = make_predict(loaded.model, task, loaded.processors)
    metrics: dict[str, float] = {}
    for name, examples in built.items():
        batches = eval_batches(examples, batch_size=size, seed=config["train"]["seed"], rows=rows)
        with Bar(f"evaluate {name}{split}", sum(1 for _ in groups(examples, size))) as bar:
            found = evaluate(
                predict, task, loaded.params, bar.track(batches), examples, gather=gather
            )
        metrics |= {name + metric: value for metric, value in found.items()}
    signatures = {f"{name}_signature": text for name, text in task.signatures.items()}
    about = {
        "workdir": str(workdir),
        "split": split,
        "examples": len(built[""]),
        "step": loaded.step,
    }
    about |= {"left_out": len(tolerance.found)} if tolerance.found else {}
    undefined = [name for name in task.measures if name not in metrics]
    about |= {"undefined": undefined} if undefined else {}
    return about | metrics | signatures


def share(size: int) -> tuple[int, np.ndarray | None, Callable[[PyTree], PyTree]]:
    """Returns the batch size, the rows of a batch that this host computes (None: all), and the
    function that gathers the rows of all hosts.

    The size is rounded up to a multiple of the number of hosts.
    """
    if not hosts.several():
        return size, None, jax.device_get
    part = -(-size // jax.process_count())
    rows = part * jax.process_index() + np.arange(part)
    return part * jax.process_count(), rows, hosts.join_rows
