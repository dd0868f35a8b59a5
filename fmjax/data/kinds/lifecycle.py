"""The life of a processor: fitted to the training data, stored in the run with a hash, restored,
saved beside weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fmjax import contracts
from fmjax.contracts import Column, Config, Processors, Source, Value
from fmjax.data.kinds import find
from fmjax.data.records import Bundle

FOLDER = "processors"  # of a run or a model folder: of kinds that have no place of their own there


class Group:
    """The columns that one processor reads: those of a kind, of all parts of a mixture that have
    the same settings for it.
    """

    def __init__(self, kind: str, settings: Config | None):
        self.kind, self.settings = kind, settings
        self.columns: list[Column] = []
        self.added: list[Value] = []

    @property
    def processor(self) -> type[contracts.Processor]:
        return find(self.kind)


def groups(task: contracts.Task, source: Source | Bundle | None = None) -> dict[str, Group]:
    """Returns the groups of columns that a task reads, by the key of their processor.

    Args:
      task: of a mixture, all parts are taken.
      source: the training data, of a mixture a `Bundle`; None: the groups have no columns.
    """
    found: dict[str, Group] = {}
    for part, own in task.tasks.items():
        data: Source | None = source.parts[part] if isinstance(source, Bundle) else source
        for kind in dict.fromkeys(own.reads.values()):
            settings = own.processing.get(kind)
            same = kind not in found or found[kind].settings == settings
            group = found.setdefault(kind if same else f"{part}/{kind}", Group(kind, settings))
            group.added += own.adds.get(kind, ())
            if data is not None:
                group.columns += [
                    Column(data, column) for column, other in own.reads.items() if other == kind
                ]
    return found


def fit(group: Group, data: Config) -> contracts.Processor:
    """Returns a processor that fits a group's columns; `data` is the config's section."""
    settings = data if group.settings is None else group.settings
    return group.processor.fit(group.columns, settings, group.added)


def fit_all(task: contracts.Task, source: Source | Bundle, data: Config) -> Processors:
    """Returns processors fitted to the training data, whatever the config names."""
    return Processors(named={key: fit(group, data) for key, group in groups(task, source).items()})


def from_settings(task: contracts.Task) -> Processors:
    """Returns the processors of the kinds that a task's settings determine, such as those of
    images.
    """
    given = {key: group for key, group in groups(task).items() if group.settings is not None}
    return Processors(named={key: fit(group, {}) for key, group in given.items()})


def run_folder(workdir: Path, key: str) -> Path:
    """Returns the folder of a run in which a processor is stored."""
    return workdir / "tokenizer" if key == "text" else workdir / FOLDER / key


def restore(workdir: Path, task: contracts.Task) -> Processors:
    """Returns the processors that a run has stored. One that follows from the task's settings need
    not be: old runs have none.

    Raises UserError if one is missing or damaged.
    """
    found: dict[str, contracts.Processor] = {}
    for key, group in groups(task).items():
        folder = run_folder(workdir, key)
        stored = group.settings is None or folder.is_dir()
        found[key] = group.processor.restore(folder) if stored else fit(group, {})
    return Processors(named=found)


def store(workdir: Path, processors: Processors) -> None:
    """Writes processors into a run."""
    for key, processor in processors.items():
        processor.save(run_folder(workdir, key))


def save(folder: Path, processors: Processors) -> None:
    """Writes processors into a model folder of Hugging Face's layout."""
    for key, processor in processors.items():
        processor.save(folder if processor.at_root and "/" not in key else folder / FOLDER / key)


def hashes(processors: Processors) -> Config:
    """Returns what provenance says of processors: their hashes, that of the tokenizer as
    "tokenizer".
    """
    others = {
        key: {"sha256": processor.sha256} for key, processor in processors.items() if key != "text"
    }
    text = {"tokenizer": processors["text"].sha256} if "text" in processors else {}
    return text | ({FOLDER: others} if others else {})


def missing(task: contracts.Task, processors: Processors) -> Iterator[type[contracts.Processor]]:
    """Yields the processor classes that a task needs and has not."""
    for key, group in groups(task).items():
        if key not in processors:
            yield group.processor
