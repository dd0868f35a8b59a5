"""The examples of every split, from one source or a mixture, without the bad records that may be
skipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fmjax.contracts import Config, Examples, Processors, Task
from fmjax.data.records import ConcatenatedSources
from fmjax.data.stream.balance import Resampled, balance
from fmjax.data.stream.buckets import MULTIPLE, Bucketed, bucketed
from fmjax.data.stream.mixing import MixedExamples
from fmjax.data.stream.tolerance import CHUNK, Tolerance
from fmjax.distributed.hosts import say
from fmjax.distributed.layout import length_parts
from fmjax.errors import UserError

PARTS = "validation/"  # followed by the name of a source: the split of its validation data


def make_examples(
    task: Task,
    sources: dict[str, Any],
    processors: Processors,
    config: Config,
    tolerance: Tolerance,
) -> dict[str, Examples]:
    """Returns a task's examples of each split, and of each source of the validation data if there
    are several.

    Removes bad records from `sources`. Raises UserError for records that cannot be read and may not
    be skipped."""

    def build(source: Any, train: bool) -> tuple[Any, Examples]:
        return build_examples(
            task, source, processors, config["data"]["max_length"], train, tolerance
        )

    examples: dict[str, Examples] = {}
    for split, source in list(sources.items()):
        if split == "train" and isinstance(source, ConcatenatedSources):
            own = {name: build(part, train=True) for name, part in source.parts.items()}
            sources[split] = ConcatenatedSources({name: kept for name, (kept, _) in own.items()})
            mixed = MixedExamples(
                alike({name: part for name, (_, part) in own.items()}),
                config["data"],
                config["train"]["seed"],
            )
            examples[split] = mixed
            say(mixed.describe())
            continue
        sources[split], examples[split] = build(source, train=split == "train")
        if split == "validation" and isinstance(source, ConcatenatedSources):
            examples |= {
                PARTS + name: build(part, train=False)[1]
                for name, part in sources[split].parts.items()
            }
    examples["train"] = balanced(examples["train"], config)
    return in_buckets(examples, config["data"], math.lcm(MULTIPLE, length_parts(config)))


def alike(parts: Mapping[str, Examples]) -> dict[str, Examples]:
    """Returns the examples of several sources. Since batches mix them, packed ones get the same
    target length, the longest.
    """
    longest = max(part.target_length for part in parts.values())
    return {
        name: part.repacked(longest) if 0 < part.target_length < longest else part
        for name, part in parts.items()
    }


def in_buckets(examples: dict[str, Examples], data: Config, multiple: int) -> dict[str, Examples]:
    """Returns the examples of each split in the length buckets of the config; all splits use the
    buckets of training, if it has some. Inferred borders are multiples of `multiple`."""
    given, sizes = data.get("buckets") or (), (data["max_length"], data["batch_size"], multiple)
    train = bucketed(examples["train"], given, *sizes)
    if isinstance(train, Bucketed):
        given = train.borders
    return {split: bucketed(own, given, *sizes) for split, own in examples.items()} | {
        "train": train
    }


def build_examples(
    task: Task, source: Any, processors: Processors, length: int, train: bool, tolerance: Tolerance
) -> tuple[Any, Examples]:
    """Returns a source without the bad records that may be skipped, and a task's examples of it.

    Raises UserError for records that cannot be read and may not be skipped.
    """

    def use(kept: Any) -> Examples:
        examples = task.examples(kept, processors, length, train=train)
        if (
            tolerance.most and not train
        ):  # in evaluation nothing can replace an example, so all are read once
            for index in range(len(examples)):
                examples[index]
        return examples

    with tolerance.active():
        return tolerance.apply(source, use, CHUNK)


def balanced(examples: Examples, config: Config) -> Examples:
    """Returns the training examples, resampled according to the config. Prints the number of
    examples per class.
    """
    kind, power = config["data"].get("balance", "none"), config["data"].get("balance_power", 1.0)
    if isinstance(examples, MixedExamples) and kind != "none":
        raise UserError(
            f"data.balance={kind}: a mixture of sources has weights instead; set it to none"
        )
    resampled = balance(examples, kind, power, config["train"]["seed"])
    if isinstance(resampled, Resampled) and examples.classes is not None:
        before, after = (
            np.bincount(classes).tolist()
            for classes in (examples.classes, examples.classes[resampled.chosen])
        )
        say(f"data.balance={kind}: {before} examples per class become {after}")
    return resampled


def check_positions(config: Config) -> None:
    """Raises UserError if rows are longer than the position table; 0 means no limit."""
    length, positions = config["data"]["max_length"], config["model"].get("positions", 0)
    if 0 < positions < length:
        table = f"the position table, model.positions={positions}"
        how = "lower the first or raise the second"
        raise UserError(f"data.max_length={length} is longer than {table}; {how}")
