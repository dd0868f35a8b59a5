"""`train.py --dry-run`: the settings of a run and its first batch as text; nothing is trained or
written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fmjax import pytree
from fmjax.config import is_run
from fmjax.contracts import Config, HostBatch, Task, Value
from fmjax.data.kinds import text
from fmjax.data.stream.batches import Reading, TrainBatches
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.filesystems.buckets import BucketPath
from fmjax.filesystems.paths import RunPath
from fmjax.train import start
from fmjax.train.experiment import Experiment, prepare

ROWS = 2  # displayed rows of the batch
LONGEST = 600  # displayed characters of a row
TARGETS = {"labels": "label_weights", "masked_labels": "masked_weights"}  # and their weights
TOKENS = ("input_ids", "decoder_input_ids")  # arrays of token ids


def dry_run(given: Config, workdir: RunPath, overridden: Collection[str] = ()) -> None:
    """Prints the settings that a config would train with, and its first batch, on stdout.

    Creates no folder. `overridden` are the keys that do not come from the config file. Raises
    UserError if the config or the data do not fit, or there is no such bucket.
    """
    if isinstance(workdir, BucketPath):
        workdir.check()
    if is_run(workdir):
        show(prepare(given, workdir, overridden))
        return
    with tempfile.TemporaryDirectory() as empty:
        show(prepare(given, Path(empty), overridden))


def show(experiment: Experiment) -> None:
    """Prints the settings, the size of the run and one batch."""
    print("Settings (unset keys are not shown):")
    for line in settings(experiment.config):
        print(f"  {line}")
    start.announce(experiment, 0)
    batch = first_batch(experiment)
    print("\nThe first batch:")
    for line in described(batch, experiment):
        print(f"  {line}")
    print("\nDry run: nothing was trained, and nothing was written.")


def settings(config: Mapping[str, Value], path: str = "") -> Iterator[str]:
    """Yields a line per key that is set."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from settings(value, f"{path}{key}.")
        elif value is not None and value != "" and key != "fmjax":
            yield f"{path}{key} = {shortened(str(value))}"


def first_batch(experiment: Experiment) -> dict[str, np.ndarray]:
    """Returns the batch of step 1."""
    examples, size = experiment.built.examples["train"], experiment.batch_size
    with_none = Reading(workers=0, prefetch=0)
    batches = TrainBatches(examples, batch_size=size, seed=experiment.seed, reading=with_none)
    try:
        return dict(next(batches))
    finally:
        batches.close()


def described(batch: HostBatch, experiment: Experiment) -> Iterator[str]:
    """Yields the name, type and shape of each array, and readable text of the first rows."""
    for name, array in batch.items():
        yield f"{name}: {array.dtype} [{', '.join(map(str, array.shape))}]"
    processors, task = experiment.data.processors, experiment.built.task
    tokenizer = processors.of(text.Processor).tokenizer if "text" in processors else None
    # The arrays of a mixture are nested: one batch for each task.
    nested: Mapping[str, Any] = pytree.unnames(batch) if task.splits else {"": batch}
    for part, own in task.tasks.items():
        for row in range(min(ROWS, experiment.batch_size)):
            for line in row_lines(nested[part], row, own, tokenizer):
                yield f"{part} row {row + 1}: {line}".strip()


def row_lines(batch: HostBatch, row: int, task: Task, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Yields the readable content of a row: its texts and its labels."""
    if tokenizer is not None:
        for name in TOKENS:
            if name in batch:
                for ids in np.atleast_2d(batch[name][row]):
                    yield f"{name}: {shortened(decoded(ids, tokenizer))}"
            if name in batch and {"start_positions", "end_positions"} <= batch.keys():
                first, last = batch["start_positions"][row], batch["end_positions"][row]
                answer = decoded(batch[name][row][first : last + 1], tokenizer)
                yield f"answer: {shortened(answer)} (tokens {first} to {last})"
    for name, weights in TARGETS.items():
        if name not in batch:
            continue
        target = batch[name][row]
        if task.labels:
            yield f"{name}: {shortened(named(target, batch, row, task))}"
        elif target.ndim and tokenizer is not None:
            chosen = batch[weights][row] > 0 if weights in batch else np.ones_like(target, bool)
            yield f"{name}: {shortened(decoded(target[chosen], tokenizer))}"
        else:
            yield f"{name}: {target}"


def named(labels: np.ndarray, batch: HostBatch, row: int, task: Task) -> str:
    """Returns the label names of a row: one class, several, or one per word."""
    names = np.array(task.labels)
    if labels.ndim == 0:
        return str(names[int(labels)])
    if "label_weights" in batch:  # one label for each word
        return " ".join(names[labels[batch["label_weights"][row] > 0]])
    return ", ".join(names[labels > 0]) or "none"


def decoded(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """Returns the text of a row, with its padding as a count."""
    padded = (
        int((ids[::-1] != tokenizer.fill_id).argmax()) if (ids != tokenizer.fill_id).any() else 0
    )
    kept = ids[: ids.size - padded]
    tail = f" + {padded} of padding" if padded else ""
    return tokenizer.decode(kept[kept < tokenizer.vocab_size]) + tail


def shortened(line: str) -> str:
    line = " ".join(line.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
