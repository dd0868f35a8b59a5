"""The examples of every split, of one source or of a mixture, without the bad records that may be left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fmjax.data.records import Bundle, ConcatenatedSources
from fmjax.data.stream import overlap
from fmjax.data.stream.balance import balance
from fmjax.data.stream.buckets import bucketed
from fmjax.data.stream.mixing import MixedExamples
from fmjax.data.stream.tolerance import CHUNK, Tolerance
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.distributed.hosts import say
from fmjax.errors import UserError

Config = dict[str, Any]
PARTS = "validation/"  # before the name of a source, the split of that part of the validation data


def make_examples(
    task: Any, sources: dict[str, Any], tokenizer: Tokenizer | None, config: Config, tolerance: Tolerance
) -> dict[str, Any]:
    """Returns a task's examples of each split, and of each source of the validation data where they are of several.

    Bad records are taken out of `sources`. Raises UserError for records that cannot be read and may not be left out.
    """

    def build(source: Any, train: bool) -> tuple[Any, Any]:
        return build_examples(task, source, tokenizer, config["data"]["max_length"], train, tolerance)

    examples: dict[str, Any] = {}
    for split, source in list(sources.items()):
        if split == "train" and isinstance(source, ConcatenatedSources):
            own = {name: build(part, train=True) for name, part in source.parts.items()}
            sources[split] = ConcatenatedSources({name: kept for name, (kept, _) in own.items()})
            made = alike({name: part for name, (_, part) in own.items()})
            examples[split] = MixedExamples(made, config["data"], config["train"]["seed"])
            say(examples[split].describe())
            continue
        sources[split], examples[split] = build(source, train=split == "train")
        if split == "validation" and isinstance(source, ConcatenatedSources):
            examples |= {PARTS + name: build(part, train=False)[1] for name, part in sources[split].parts.items()}
    examples["train"] = balanced(examples["train"], config)
    return in_buckets(examples, config["data"])


def alike(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the examples of several sources, packed ones with targets of one length, that of the longest: batches mix them."""
    longest = max((part.row_lengths[1] for part in parts.values() if hasattr(part, "repacked")), default=0)
    return {
        name: part.repacked(longest) if hasattr(part, "repacked") and part.row_lengths[1] < longest else part
        for name, part in parts.items()
    }


def in_buckets(examples: dict[str, Any], data: Config) -> dict[str, Any]:
    """Returns the examples of each split in the length buckets that the config asks for, those of training."""
    given, sizes = data.get("buckets") or (), (data["max_length"], data["batch_size"])
    train = bucketed(examples["train"], given, *sizes)
    if train is examples["train"]:
        return examples
    return {split: bucketed(made, train.borders, *sizes) for split, made in examples.items()} | {"train": train}


def build_examples(
    task: Any, source: Any, tokenizer: Tokenizer | None, length: int, train: bool, tolerance: Tolerance
) -> tuple[Any, Any]:
    """Returns a source without the bad records that may be left out, and a task's examples of it.

    Raises UserError for records that cannot be read and may not be left out.
    """

    def use(kept: Any) -> Any:
        made = task.examples(kept, tokenizer, length, train=train)
        if tolerance.most and not train:  # in evaluation nothing can take the place of an example, so all are read once
            for index in range(len(made)):
                made[index]
        return made

    return tolerance.apply(source, use, CHUNK)


def balanced(examples: Any, config: Config) -> Any:
    """Returns the training examples, resampled as the config says; says how many there are of each class."""
    kind, power = config["data"].get("balance", "none"), config["data"].get("balance_power", 1.0)
    if isinstance(examples, MixedExamples) and kind != "none":
        raise UserError(f"data.balance={kind}: a mixture of sources has weights instead; choose none")
    resampled = balance(examples, kind, power, config["train"]["seed"])
    if resampled is not examples:
        before, after = (np.bincount(classes).tolist() for classes in (examples.classes, examples.classes[resampled.chosen]))
        say(f"data.balance={kind}: {before} examples by class become {after}")
    return resampled


def find_overlap(task: Any, sources: Mapping[str, Any]) -> Config:
    """Warns of records of validation whose texts are in the training data; returns how many, for provenance."""
    train, held = sources["train"], sources.get("validation")
    if isinstance(train, Bundle):
        task, train = task.main, next(iter(train.parts.values()))
    if held is None:
        return {}
    found = overlap.find_overlap(train, held, overlap.text_columns(task, held))
    if found is None:
        return {}
    if found.count:
        say(found.warning())
    return {"overlap": {"records": found.count, "validation": found.held, "training": found.trained}}
