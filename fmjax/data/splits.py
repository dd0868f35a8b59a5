"""The splits of a run's data, as the config's section `data` names them: of one source or of several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmjax.data.records import Bundle, Source, hold_out
from fmjax.data.sources.open import open_source
from fmjax.data.stream.mixing import Several, parts_of
from fmjax.errors import UserError

Config = dict[str, Any]

SOURCE_OPTIONS = ("record", "columns", "name", "data_dir", "download")
PART_KEYS = ("files", "source", "hold_out", "hold_out_by", *SOURCE_OPTIONS)  # what a source of a mixture may have for itself


def open_split(data: Config, split: str) -> Source:
    """Returns the data of one split, by the config's `data` section; `hold_out` makes the validation split of files
    that have none. Raises UserError if the split is not there."""
    files = data["files"]
    if data.get("mixture") and split not in files:
        return open_mixture(data, split)
    share = data.get("hold_out") if files and "validation" not in files else None
    options = {name: data[name] for name in SOURCE_OPTIONS if name in data}
    if share and split in ("train", "validation") and "train" in files:
        whole = open_source(data["source"], files["train"], split="train", **options)
        return hold_out(whole, share, data.get("hold_out_by") or "")[split == "validation"]
    if files and split not in files:
        raise UserError(f'data.files has no "{split}", only {", ".join(files)}; give --config.data.files.{split}=FILE')
    return open_source(data["source"], files.get(split), split=split, **options)


def open_mixture(data: Config, split: str) -> Several:
    """Returns the data of one split of all sources of a mixture that have it, which all do of training."""
    own = parts_of(data, PART_KEYS)
    chosen = {name: part for name, part in own.items() if split == "train" or has_split(part, split)}
    if not chosen:
        raise UserError(f"data.mixture: no source has {split} files; give --config.data.files.{split}=FILE")
    return Several({name: open_split(part, split) for name, part in chosen.items()})


def has_split(data: Config, split: str) -> bool:
    """Returns whether there are data of a split, or can be: what reads no files has its own splits."""
    if data.get("mixture") and split not in data["files"]:
        return any(has_split(part, split) for part in parts_of(data, PART_KEYS).values())
    return not data["files"] or split in data["files"] or bool(split == "validation" and data.get("hold_out"))


def open_sources(data: Config, parts: Mapping[str, str]) -> dict[str, Any]:
    """Returns the training and, unless there is none, the validation data; for training a mixture of tasks, the splits of its
    parts. Raises UserError for training data that are named twice, as files and as a mixture."""
    if data.get("mixture") and (parts or "train" in data["files"]):
        other = "a mixture of tasks" if parts else f"data.files.train={data['files']['train']}"
        raise UserError(
            f"data.mixture: names the training data, and so does {other}; choose one (--config.data.files={{}} empties that)"
        )
    validated = has_split(data, "validation")
    wanted = [*dict.fromkeys(parts.values() or ["train"]), *(["validation"] if validated else [])]
    opened: dict[str, Any] = {split: open_split(data, split) for split in wanted}
    if parts:
        opened["train"] = Bundle({part: opened[split] for part, split in parts.items()})
    return {split: opened[split] for split in ("train", "validation") if split in opened}
