"""Opens the splits of a run's data, from one or several sources, as described by the config's
`data` section."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from fmjax.contracts import Config, Record, Source
from fmjax.data.groups import Groups
from fmjax.data.partitions import KEYS, SPLITS, TRAIN, Partition, Rules, divide
from fmjax.data.records import Bundle, ConcatenatedSources, Selected, hold_out
from fmjax.data.sources.open import open_source
from fmjax.data.sources.sections import hold_out_sections, needs_sections
from fmjax.data.storage import cache
from fmjax.data.stream.mixing import parts_of
from fmjax.distributed.hosts import say
from fmjax.errors import UserError

SOURCE_OPTIONS = ("record", "columns", "name", "data_dir", "download")
# Keys that a source of a mixture may set itself.
PART_KEYS = ("files", "source", *KEYS, *SOURCE_OPTIONS)


def open_split(data: Config, split: str) -> Source:
    """Returns the data of one split. Keys such as `data.hold_out` create splits for files without
    them (`partitions.py`).

    Raises UserError if the split does not exist.
    """
    return open_splits(data, (split,))[split]


def open_splits(data: Config, splits: Iterable[str]) -> dict[str, Source]:
    """Returns the data of several splits; see `open_split`. Training data are opened once, also
    where other splits are parts of them."""
    files, found = data["files"], dict[str, Source]()
    divided = dict[str, Source]()
    wanted = tuple(splits)
    for split in wanted:
        if data.get("mixture") and split not in files:
            found[split] = open_mixture(data, split)
        elif "train" in files and (split == "train" or split in held_out(data)):
            divided = divided or divided_train(data, told="train" in wanted)
            found[split] = divided[split]
        elif files and split not in files:
            raise UserError(
                f'data.files has no "{split}", only {", ".join(files)}; '
                f"set --config.data.files.{split}=FILE"
            )
        else:
            found[split] = whole_split(data, split)
    return found


def whole_split(data: Config, split: str) -> Source:
    """Returns all records of the files of a split."""
    options = {name: data[name] for name in SOURCE_OPTIONS if name in data}
    with cache.verifying(bool(data.get("verify"))):
        source = open_source(data["source"], data["files"].get(split), split=split, **options)
    by = data.get("group_by")
    if not by or split == "train":
        return source
    rules = Rules(time=data.get("time") or "", group_by=by)
    return view(source, divide(source, rules), by, TRAIN, rules.mark)


def held_out(data: Config) -> tuple[str, ...]:
    """Returns the splits that are parts of the training data."""
    rules = Rules.of(data)
    return rules.splits if data["files"] and not data.get("mixture") else ()


def divided_train(data: Config, told: bool) -> dict[str, Source]:
    """Returns the training data, and the splits that are parts of them. If `told`, prints how texts
    were cut."""
    rules, whole = Rules.of(data), whole_split(data, "train")
    if told and rules.hold_out_from and data.get("hold_out_test"):
        say(
            f"warning: data.hold_out_test={data['hold_out_test']:g} has no effect beside "
            "data.hold_out_from, which takes the time at which the test data begin as a second one"
        )
    if not rules.splits and not rules.group_by:
        return {"train": whole}
    if dataclasses.replace(rules, hold_out=0.0, hold_out_by="") == Rules():
        parts = hold_out_parts(whole, rules.hold_out, rules.hold_out_by, told)
        return dict(zip(("train", "validation"), parts, strict=True))
    partition, by = divide(whole, rules), rules.group_by
    if told and rules.mixes_times:
        say(
            f"warning: the held-out records are chosen at random, so their histories "
            f"(data.group_by={by}) may have later records; to hold out the last ones, set "
            "data.time and data.hold_out, without data.fold"
        )
    return {
        split: view(whole, partition, by, SPLITS.index(split), rules.mark | {"part": split})
        for split in ("train", *rules.splits)
    }


def view(source: Source, partition: Partition, by: str, part: int, mark: Record) -> Source:
    """Returns the records of one part of a source, or of one record per group that has some."""
    if partition.groups is None:
        return Selected(source, np.flatnonzero(partition.parts == part), mark)
    return Groups(source, by, partition.groups, partition.times, partition.parts, part, mark)


def hold_out_parts(source: Source, share: float, by: str, told: bool) -> tuple[Source, Source]:
    """Returns the training and the validation part of a source. Splits its text if there are too
    few records, as in a book without blank lines, and prints how it was cut if `told`."""
    if not by and needs_sections(source, share) and (cut := hold_out_sections(source, share)):
        rest, held, note = cut
        if told:
            say(note)
        return rest, held
    return hold_out(source, share, by)


def open_mixture(data: Config, split: str) -> ConcatenatedSources:
    """Returns the data of one split from all sources of a mixture that have it. All sources have
    training data."""
    own = parts_of(data, PART_KEYS)
    chosen = {
        name: part for name, part in own.items() if split == "train" or has_split(part, split)
    }
    if not chosen:
        raise UserError(
            f"data.mixture: no source has {split} files; set --config.data.files.{split}=FILE"
        )
    return ConcatenatedSources({name: open_split(part, split) for name, part in chosen.items()})


def has_split(data: Config, split: str) -> bool:
    """Returns whether a split exists or can be created. A source that reads no files has its own
    splits."""
    if data.get("mixture") and split not in data["files"]:
        return any(has_split(part, split) for part in parts_of(data, PART_KEYS).values())
    return not data["files"] or split in data["files"] or split in held_out(data)


def open_sources(data: Config, parts: Mapping[str, str]) -> dict[str, Source | Bundle]:
    """Returns the training data and, if there are any, the validation data.

    Args:
      data: the config's section.
      parts: for a mixture of tasks, the split that each part trains on; the training data is then a
        Bundle.

    Raises UserError if training data is named both as files and as a mixture.
    """
    if data.get("mixture") and (parts or "train" in data["files"]):
        other = "a mixture of tasks" if parts else f"data.files.train={data['files']['train']}"
        raise UserError(
            f"data.mixture: names the training data, but so does {other}; use one of them "
            f"(--config.data.files={{}} unsets the files)"
        )
    validated = has_split(data, "validation")
    wanted = [*dict.fromkeys(parts.values() or ["train"]), *(["validation"] if validated else [])]
    splits = open_splits(data, wanted)
    opened: dict[str, Source | Bundle] = {
        split: splits[split] for split in ("train", "validation") if split in splits
    }
    if parts:
        opened["train"] = Bundle({part: splits[split] for part, split in parts.items()})
    return {split: opened[split] for split in ("train", "validation") if split in opened}
