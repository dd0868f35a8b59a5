"""Opens the splits of a run's data, from one or several sources, as described by the config's
`data` section."""

from __future__ import annotations

from collections.abc import Mapping

from fmjax.contracts import Config, Source
from fmjax.data.records import Bundle, ConcatenatedSources, hold_out
from fmjax.data.sources.open import open_source
from fmjax.data.sources.sections import hold_out_sections, needs_sections
from fmjax.data.storage import cache
from fmjax.data.stream.mixing import parts_of
from fmjax.distributed.hosts import say
from fmjax.errors import UserError

SOURCE_OPTIONS = ("record", "columns", "name", "data_dir", "download")
# Keys that a source of a mixture may set itself.
PART_KEYS = ("files", "source", "hold_out", "hold_out_by", *SOURCE_OPTIONS)


def open_split(data: Config, split: str) -> Source:
    """Returns the data of one split. `data.hold_out` creates a validation split for files without
    one.

    Raises UserError if the split does not exist.
    """
    with cache.verifying(bool(data.get("verify"))):
        return open_trusted(data, split)


def open_trusted(data: Config, split: str) -> Source:
    """Returns the data of one split, without regard to `data.verify`."""
    files = data["files"]
    if data.get("mixture") and split not in files:
        return open_mixture(data, split)
    share = data.get("hold_out") if files and "validation" not in files else None
    options = {name: data[name] for name in SOURCE_OPTIONS if name in data}
    if share and split in ("train", "validation") and "train" in files:
        whole = open_source(data["source"], files["train"], split="train", **options)
        return hold_out_part(whole, share, data.get("hold_out_by") or "", split)
    if files and split not in files:
        raise UserError(
            f'data.files has no "{split}", only {", ".join(files)}; '
            f"set --config.data.files.{split}=FILE"
        )
    return open_source(data["source"], files.get(split), split=split, **options)


def hold_out_part(source: Source, share: float, by: str, split: str) -> Source:
    """Returns the training or the validation part of a source. Splits its text if there are too few
    records, as in a book without blank lines.

    When the training part is opened, prints how the text was cut.
    """
    if not by and needs_sections(source, share) and (cut := hold_out_sections(source, share)):
        rest, held, note = cut
        if split == "train":
            say(note)
        return held if split == "validation" else rest
    return hold_out(source, share, by)[split == "validation"]


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
    return (
        not data["files"]
        or split in data["files"]
        or bool(split == "validation" and data.get("hold_out"))
    )


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
    splits: dict[str, Source] = {split: open_split(data, split) for split in wanted}
    opened: dict[str, Source | Bundle] = {
        split: splits[split] for split in ("train", "validation") if split in splits
    }
    if parts:
        opened["train"] = Bundle({part: splits[split] for part, split in parts.items()})
    return {split: opened[split] for split in ("train", "validation") if split in opened}
