"""Data sets of the Hugging Face Hub. The library `datasets` downloads and prepares them as Arrow
files. These are then memory-mapped, with class labels by name, and images as the bytes of files.

`data.name` is a repository, a configuration if it has several, and a commit or tag to pin:
"nyu-mll/glue/sst2@main". A folder with such files works, too. The commit is stored with the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from fmjax.contracts import Record, Source
from fmjax.data.sources.columnar import Columnar
from fmjax.data.sources.kinds import Files, SourceKind
from fmjax.data.sources.slices import part, split_slice
from fmjax.errors import UserError, nearest, one_line

COMMIT = re.compile(r"@([0-9a-f]{40})\b")


class HubRecords(Columnar):
    """A split of a data set of the Hub. `mark` is its fingerprint; None: that of its files."""

    def __init__(
        self,
        paths: list[Path],
        split: str,
        columns: tuple[str, ...],
        place: str,
        mark: Record | None,
    ):
        self.place, self.mark = place, mark
        super().__init__(paths, split, "hub", columns)

    def where(self, index: int) -> str:
        return f"{self.place} record {range(len(self))[index]}"

    def fingerprint(self) -> Record:
        if self.mark is None:
            return super().fingerprint()
        return self.mark | ({"columns": list(self.named)} if self.named else {})


def open_hub(
    files: Files | None, split: str, name: str = "", columns: tuple[str, ...] = ()
) -> Source:
    """Returns a split of a data set of the Hub.

    Args:
      files: the split, or a part of it such as "train[:90%]"; None: `split`.
      split: the name of the split.
      name: the data set, "OWNER/NAME", "OWNER/NAME/CONFIG" or a folder; "@REVISION" may follow.
      columns: the columns to read; empty: all.

    Raises UserError if `datasets` is not installed, and for a data set, a configuration or a split
    that does not exist.
    """
    if not name:
        raise UserError(
            "data.source=hub needs the name of a data set; set --config.data.name, such as "
            "nyu-mll/glue/sst2"
        )
    chosen, wanted = split_slice(files or split)
    split = chosen if isinstance(chosen, str) else ",".join(chosen)
    builder = prepared(name)
    splits = list(builder.info.splits)
    if split not in splits:
        raise UserError(
            f'{name} has no split "{split}"{nearest(split, splits)}; choose one of '
            f"{', '.join(splits)} with --config.data.files.train=SPLIT"
        )
    paths = [Path(file["filename"]) for file in builder.as_dataset(split=split).cache_files]
    if not paths:
        raise UserError(f'{name}: the split "{split}" is empty; choose one of {", ".join(splits)}')
    commit = COMMIT.search(str(builder.base_path))
    mark = {"source": "hub", "name": name.partition("@")[0], "split": split}
    mark |= (
        {"revision": commit[1], "examples": builder.info.splits[split].num_examples}
        if commit
        else {}
    )
    source = HubRecords(paths, split, tuple(columns), f"{name} {split}", mark if commit else None)
    return source if wanted is None else part(source, wanted)


def prepared(name: str) -> Any:
    """Returns the builder of a data set after downloading it, unless it is already there."""
    datasets, wrong = library(), ""
    repository, _, revision = name.partition("@")
    for path, config in readings(repository):
        try:
            builder = datasets.load_dataset_builder(path, config, revision=revision or None)
        except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
            wrong = wrong or one_line(error, 200)
            continue
        except Exception as error:  # any error of the network, the disk or the data set
            raise UserError(
                f"data.name={name}: cannot be opened ({one_line(error, 300)})"
            ) from error
        try:
            builder.download_and_prepare()
        except Exception as error:
            raise UserError(
                f"data.name={name}: cannot be downloaded and prepared ({one_line(error, 300)})"
            ) from error
        return builder
    raise UserError(
        f"data.name={name}: there is no such data set on the Hugging Face Hub, or it cannot be "
        f"reached ({wrong}); write OWNER/NAME or OWNER/NAME/CONFIG"
    )


def readings(repository: str) -> Iterator[tuple[str, str | None]]:
    """Yields what a name may mean: a folder or repository, then one with a configuration."""
    yield repository, None
    path, _, config = repository.rpartition("/")
    if path and not Path(repository).expanduser().exists():
        yield path, config


def library() -> ModuleType:
    """Returns the library `datasets`. Raises UserError if it is not installed."""
    try:
        import datasets  # an optional package, whose import takes a second
    except ImportError:
        raise UserError(
            "data.source=hub needs the package datasets; install it with: pip install datasets"
        ) from None
    module: ModuleType = datasets
    return module


SOURCES = (SourceKind("hub", open_hub, reads="split", options=("name", "columns")),)
