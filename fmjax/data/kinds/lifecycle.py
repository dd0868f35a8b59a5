"""The life cycle of a processor: fitting to the training data, storing in the run with a hash,
restoring, and saving with weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fmjax import contracts
from fmjax.contracts import Column, Config, Processors, Source, Value
from fmjax.data.kinds import find
from fmjax.data.records import Bundle
from fmjax.filesystems.paths import RunPath, as_local, written_from_local

FOLDER = (
    "processors"  # folder in a run or a model folder, for kinds that have no standard place there
)


class Group:
    """The columns that one processor reads: all columns of a kind in the parts of a mixture with
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
      task: the task; for a mixture, all parts count.
      source: the training data; a `Bundle` for a mixture; None: the groups have no columns.
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
    """Returns the processors that a task's settings determine, such as those of images."""
    given = {key: group for key, group in groups(task).items() if group.settings is not None}
    return Processors(named={key: fit(group, {}) for key, group in given.items()})


def run_folder(workdir: RunPath, key: str) -> RunPath:
    """Returns the folder of a run in which a processor is stored."""
    return workdir / "tokenizer" if key == "text" else workdir / FOLDER / key


def restore(workdir: RunPath, task: contracts.Task) -> Processors:
    """Returns the processors stored in a run. One that the task's settings determine may be
    missing: old runs did not store it.

    Raises UserError if one is missing or damaged.
    """
    found: dict[str, contracts.Processor] = {}
    for key, group in groups(task).items():
        folder = run_folder(workdir, key)
        stored = group.settings is None or folder.is_dir()
        if not stored:
            found[key] = fit(group, {})
            continue
        with as_local(folder) as local:
            found[key] = group.processor.restore(local)
    return Processors(named=found)


def store(workdir: RunPath, processors: Processors) -> None:
    """Writes processors into a run."""
    for key, processor in processors.items():
        with written_from_local(run_folder(workdir, key)) as local:
            processor.save(local)


def save(folder: Path, processors: Processors) -> None:
    """Writes processors into a model folder in Hugging Face's format."""
    for key, processor in processors.items():
        processor.save(folder if processor.at_root and "/" not in key else folder / FOLDER / key)


def hashes(processors: Processors) -> Config:
    """Returns the hashes of processors for provenance; that of the tokenizer is "tokenizer"."""
    others = {
        key: {"sha256": processor.sha256} for key, processor in processors.items() if key != "text"
    }
    text = {"tokenizer": processors["text"].sha256} if "text" in processors else {}
    return text | ({FOLDER: others} if others else {})


def missing(task: contracts.Task, processors: Processors) -> Iterator[type[contracts.Processor]]:
    """Yields the processor classes that a task needs but does not have."""
    for key, group in groups(task).items():
        if key not in processors:
            yield group.processor
