"""What provenance records of the data of a new run: the overlap of its splits, and how full rows
are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fmjax.contracts import Config, Examples, Processors, Source, Task
from fmjax.data.identity import identity
from fmjax.data.kinds import lifecycle
from fmjax.data.records import Bundle
from fmjax.data.storage import cache, token_store
from fmjax.data.stream import overlap
from fmjax.data.stream.packing import fill_of
from fmjax.distributed.hosts import say

FORMAT = 1  # raised when the same data have another overlap than before


def notes_of(
    task: Task, sources: Mapping[str, Source | Bundle], processors: Processors, train: Examples
) -> Config:
    """Returns the overlap of the splits, if some is looked for, and the fill of packed rows.

    Warns about validation records that also occur in the training data."""
    fill = fill_of(train)
    notes: Config = {"fill": fill} if fill else {}
    trained, held = sources["train"], sources.get("validation")
    if isinstance(trained, Bundle):
        trained = next(iter(trained.parts.values()))
    if held is None or isinstance(held, Bundle):
        return notes
    found = remembered_overlap(task, trained, held, processors)
    if found["warning"]:
        say(found["warning"])
    facts: Config = found["facts"]
    return facts | notes


def remembered_overlap(task: Task, train: Source, held: Source, processors: Processors) -> Config:
    """Returns the overlap as `facts` and a `warning`, which may be empty.

    It is computed once for the same data: it reads records from everywhere, so that a start would
    read most of a large text."""
    reads = dict(task.reads)

    def find() -> Config:
        found = overlap.find_overlap(train, held, reads, processors)
        if found is None:
            return {"warning": "", "facts": {}}
        counts = {"records": found.count, "validation": found.held, "training": found.trained}
        return {"warning": found.warning() if found.count else "", "facts": {"overlap": counts}}

    content = [identity(train), identity(held)]
    if None in content:
        return find()
    name = token_store.digest_of(FORMAT, *content, reads, lifecycle.hashes(processors))
    return cache.remembered(Path("overlap", f"{name}.json"), find)
