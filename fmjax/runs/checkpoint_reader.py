"""Reads the checkpoints of a run: which there are, which is the best, and what is in one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fmjax import hardware
from fmjax.contracts import Config, PyTree
from fmjax.distributed.hosts import say
from fmjax.errors import UserError
from fmjax.filesystems.paths import RunPath
from fmjax.runs import orbax_items
from fmjax.runs.manifest import (
    MANIFEST,
    DamagedError,
    Manifest,
    check_arrays,
    check_fits,
    read_manifest,
    verify_files,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Best:
    """The metric, by its name in `save`, whose best step is kept; `mode` is "max" or "min"."""

    metric: str
    mode: str = "max"

    def __post_init__(self) -> None:
        if self.mode not in ("max", "min"):
            raise UserError(
                f'mode "{self.mode}" of the metric {self.metric} is unknown; choose max or min'
            )


class CheckpointReader:
    """The checkpoints in a folder, which need not exist. Reading changes nothing there, and may go
    on beside a writer.
    """

    def __init__(self, directory: RunPath, *, best: Best | None = None):
        self.directory = directory.absolute()
        self._best = best
        self._verified: set[int] = set()

    def steps(self) -> list[int]:
        """Returns the steps that have a manifest, in order."""
        manifests = self.directory.glob(f"*/{MANIFEST}")
        return sorted(
            int(path.parent.name)
            for path in manifests
            if re.fullmatch(r"0|[1-9]\d*", path.parent.name)
        )

    def latest(self) -> int | None:
        """Returns the newest whole step, None if nothing was saved; says so in one line where it
        passes over a damaged one.

        Raises UserError if there are checkpoints and none is whole: starting afresh would hide a
        loss.
        """
        step = self._first_whole(reversed(self.steps()))
        if step is None and (self.steps() or any(self.directory.glob("*.damaged*"))):
            raise UserError(
                f"{self.directory}: every checkpoint is damaged; put one back from a copy, or "
                "remove this folder to start afresh"
            )
        return step

    def best(self) -> int | None:
        """Returns the whole step with the best metric, the first of equals; None if no step has
        that metric.
        """
        return self._first_whole(self._ranked())

    def items(self, step: int) -> list[str]:
        """Returns the names of a step's items. As `data` and `metrics`, raises UserError if there
        is no such step.
        """
        return list(self._manifest(step)["items"])

    def data(self, step: int) -> Config:
        """Returns the `data` that the step was saved with."""
        return dict(self._manifest(step)["data"])

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the metrics that the step was saved with."""
        return dict(self._manifest(step)["metrics"])

    def restore(self, step: int, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Returns the items named in `abstract`, each in the structure and with the shardings of
        its abstract tree.

        Args:
          step: a step of `steps()`.
          abstract: for each item a tree of ShapeDtypeStruct; a leaf without a sharding comes on the
            first device of each host.

        Raises:
          UserError: there is no such step, it is damaged, or it does not fit `abstract`, with the
            names that differ.
        """
        manifest = self._verify(step)
        check_fits(manifest["items"], abstract, self._folder(step))
        items = self._restore(self._content(step, manifest), abstract)
        check_arrays(manifest.get("arrays", {}), items, self._folder(step))
        return items

    def _restore(self, content: RunPath, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
        try:
            return orbax_items.restore(content, abstract)
        except Exception as error:
            # The libraries for buckets have errors of many kinds.
            if isinstance(content, Path) or hardware.explanation(error):
                raise
            raise UserError(
                f"{content}: cannot be read ({ending(error)}); fix the permissions of the bucket "
                "or the network, and run the same command again"
            ) from error

    def _folder(self, step: int) -> RunPath:
        return self.directory / str(step)

    def _content(self, step: int, manifest: Manifest) -> RunPath:
        """Returns the folder of a step's items."""
        folder = self._folder(step)
        return folder / manifest["attempt"] if manifest.get("attempt") else folder

    def _manifest(self, step: int) -> Manifest:
        with suppress(FileNotFoundError):  # a trainer may delete it meanwhile
            if (self._folder(step) / MANIFEST).exists():
                return read_manifest(self._folder(step))
        known = ", ".join(map(str, self.steps())) or "none"
        raise UserError(
            f"{self.directory}: has no checkpoint of step {step}; choose one of its steps: {known}"
        )

    def _verify(self, step: int) -> Manifest:
        manifest = self._manifest(step)
        if step not in self._verified:
            verify_files(self._content(step, manifest), manifest["files"])
            self._verified.add(step)
        return manifest

    def _first_whole(self, steps: Iterable[int]) -> int | None:
        return next((step for step in steps if self._unless_damaged(self._verify, step)), None)

    def _unless_damaged(self, read: Callable[[int], T], step: int) -> T | None:
        """Returns what `read` does, or None if the step is gone or, with a warning, damaged."""
        try:
            return read(step)
        except (UserError, FileNotFoundError) as error:
            # A step that is deleted loses its manifest before its files: without one it is gone,
            # not damaged.
            if (self._folder(step) / MANIFEST).exists():
                if not isinstance(error, DamagedError):
                    raise
                self._pass_over(step, error)
            return None

    def _pass_over(self, step: int, error: DamagedError) -> None:
        say(f"warning: {error}; skipped")

    def _ranked(self) -> list[int]:
        """Returns the steps that have the metric, best first; not verified."""
        if self._best is None:
            return []
        values: dict[int, float] = {}
        for step in self.steps():
            value = (self._unless_damaged(self.metrics, step) or {}).get(
                self._best.metric, math.nan
            )
            if math.isfinite(value):
                values[step] = -value if self._best.mode == "max" else value
        return sorted(values, key=lambda step: (values[step], step))


def ending(error: BaseException) -> str:
    """Returns the end of a message, where the storage layer puts the cause, after the paths."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 120 else f"...{text[-120:]}"
