"""Checkpoints of a run: saved by Orbax in the background, sealed with a manifest, verified before
they are used.

    checkpoints/20/params/ opt_state/ step/   one Orbax item each: evaluation reads `params` alone
    checkpoints/20/manifest.json              items, data, metrics; SHA-256 and size of every file
    checkpoints/10.damaged/                   set aside, for a person to look at

In a bucket Orbax writes the objects of a step in place, and a file that commits them. The manifest
has the digests that the bucket gives for its objects, and those of the arrays in memory.

The manifest is written last. Orbax restores files with flipped bits silently and takes an empty
folder for a step; hence the manifest. A step without one does not exist: it is being written, being
deleted, or was left by a kill. Items are stored as nested dictionaries by name (`fmjax.pytree`), so
no optimizer class is needed to read them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

from fmjax.buckets import BucketPath
from fmjax.contracts import Config, PyTree
from fmjax.distributed import hosts
from fmjax.distributed.hosts import say
from fmjax.errors import UserError
from fmjax.paths import RunPath, remove_tree, rename
from fmjax.runs import array_digests, orbax_items
from fmjax.runs.lock import TakenOver
from fmjax.runs.manifest import (
    MANIFEST,
    DamagedError,
    Manifest,
    check_arrays,
    check_fits,
    describe,
    flat,
    list_files,
    read_manifest,
    verify_files,
    write_manifest,
)

T = TypeVar("T")
MADE_BY_ORBAX = "_CHECKPOINT_METADATA"
Digests: TypeAlias = tuple[Sequence[str], PyTree]  # names of arrays, and their digests
LEFTOVER = re.compile(r"\d+\.(deleted|orbax-checkpoint-tmp.*)")


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
        items = self._restore(step, abstract)
        check_arrays(manifest.get("arrays", {}), items, self._folder(step))
        return items

    def _restore(self, step: int, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
        try:
            return orbax_items.restore(self._folder(step), abstract)
        except (OSError, ValueError) as error:
            if isinstance(self.directory, Path):
                raise
            raise UserError(
                f"{self._folder(step)}: cannot be read ({ending(error)}); fix the permissions of "
                "the bucket or the network, and run the same command again"
            ) from error

    def _folder(self, step: int) -> RunPath:
        return self.directory / str(step)

    def _manifest(self, step: int) -> Manifest:
        if not (self._folder(step) / MANIFEST).exists():
            known = ", ".join(map(str, self.steps())) or "none"
            raise UserError(
                f"{self.directory}: has no checkpoint of step {step}; choose one of its steps: "
                f"{known}"
            )
        return read_manifest(self._folder(step))

    def _verify(self, step: int) -> Manifest:
        manifest = self._manifest(step)
        if step not in self._verified:
            verify_files(self._folder(step), manifest["files"])
            self._verified.add(step)
        return manifest

    def _first_whole(self, steps: Iterable[int]) -> int | None:
        return next((step for step in steps if self._unless_damaged(self._verify, step)), None)

    def _unless_damaged(self, read: Callable[[int], T], step: int) -> T | None:
        """Returns what `read` does, or None if the step is gone or, with a warning, damaged."""
        try:
            return read(step)
        except UserError as error:
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


class NotSaved(UserError):
    """A checkpoint could not be written."""


class Checkpoints(CheckpointReader):
    """The one writer of a run's checkpoints: keeps the newest `keep` and the best. Opening removes
    what a kill left.

    A save is copied at once and written behind the training; if that fails, the next call raises
    UserError.
    """

    def __init__(
        self,
        directory: RunPath,
        *,
        keep: int = 2,
        best: Best | None = None,
        before_seal: Callable[[], None] = lambda: None,
    ):
        """
        Args:
          directory: the folder of the checkpoints.
          keep: the number of newest steps to keep.
          best: the metric whose best step is kept as well.
          before_seal: writes what must be there when a step is; called behind the training.

        Raises UserError if the folder cannot be made, or `keep` is below 1.
        """
        super().__init__(directory, best=best)
        if keep < 1:
            raise UserError(
                f"checkpoint.keep={keep}: the newest checkpoint must be kept to continue from; "
                "use 1 or more"
            )
        self._first = hosts.first()  # of several hosts, which alone deletes, sets aside and seals
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{directory}: cannot be made ({error.strerror}); name another --workdir"
            ) from None
        self._keep, self._before_seal = keep, before_seal
        self._clean()
        hosts.meet("checkpoints")
        self._orbax = orbax_items.writer()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Future[None]] | None = None

    def save(
        self,
        step: int,
        items: Mapping[str, PyTree],
        data: Config,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts saving a step, after the save before has ended; on return, arrays may be donated
        and `data` changed.

        Args:
          step: its number; saving a step again is an error.
          items: a tree of arrays for each name; `restore` returns them one by one.
          data: what else to continue from, as JSON.
          metrics: what to choose the best step by.

        Raises:
          NotSaved: this save could not be started, or the one before has failed.
        """
        self.wait()
        trees = {item: flat(tree) for item, tree in items.items()}
        content = {
            "step": step,
            "items": {
                item: {name: describe(leaf) for name, leaf in tree.items()}
                for item, tree in trees.items()
            },
            "data": data,
            # One that is not finite chooses no step.
            "metrics": {
                name: float(value)
                for name, value in (metrics or {}).items()
                if math.isfinite(value)
            },
        }
        # As it is now, and as it will be read.
        content = json.loads(json.dumps(content, allow_nan=False))
        digests = self._start_digests(trees)
        try:
            orbax_items.start(self._orbax, self._folder(step), trees)
        except Exception as error:
            # The libraries for buckets have errors of many kinds.
            if isinstance(self.directory, Path) and not isinstance(error, OSError | ValueError):
                raise
            raise self._failed(step, error) from error
        self._pending = step, self._thread.submit(self._finish, step, content, digests)

    def wait(self) -> None:
        """Returns when the last save has ended. Raises NotSaved if it has failed, and TakenOver if
        `before_seal` did.
        """
        if self._pending is None:
            return
        step, future = self._pending
        error, self._pending = future.exception(), None
        if isinstance(error, TakenOver):  # nothing may be removed
            raise error
        if error:
            raise self._failed(step, error) from error

    def close(self) -> None:
        """Waits for the last save and ends the threads, also where it raises NotSaved because that
        save has failed.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def _start_digests(self, trees: Mapping[str, Mapping[str, PyTree]]) -> dict[str, Digests]:
        """Starts computing the digests of a step's arrays in a bucket, before they are donated."""
        if isinstance(self.directory, Path):  # whose files are read again
            return {}
        return {
            item: (list(leaves), array_digests.start(leaves))
            for item, leaves in trees.items()
            if leaves
        }

    def _finish(self, step: int, content: Manifest, digests: Mapping[str, Digests]) -> None:
        """Seals a step when Orbax has written it, on every host."""
        self._orbax.wait_until_finished()
        if not self._first:
            return
        folder = self._folder(step)
        self._before_seal()
        if digests:
            arrays = {item: array_digests.read(*pair) for item, pair in digests.items()}
            content = content | {"arrays": arrays}
        write_manifest(folder, content | {"files": list_files(folder)})
        kept = {*self.steps()[-self._keep :], *self._ranked()[:1]}
        for old in set(self.steps()) - kept:
            self._delete(old)

    def _failed(self, step: int, error: BaseException) -> NotSaved:
        try:
            self._clean()
            found = self.steps()
        except (OSError, UserError):  # of a bucket that denies access
            found = []
        reason = ending(error)
        if isinstance(self.directory, BucketPath):
            return NotSaved(
                f"{self._folder(step)}: the checkpoint could not be written ({reason}); fix the "
                "permissions of the bucket or the network, then the same command continues"
            )
        return NotSaved(
            f"{self._folder(step)}: the checkpoint could not be written ({reason}); free disk "
            "space or fix its permissions, then the same command continues "
            f"{f'from step {found[-1]}' if found else 'from the start'}"
        )

    def _delete(self, step: int) -> None:
        (self._folder(step) / MANIFEST).unlink()
        if isinstance(self.directory, BucketPath):  # where a rename is one copy for each object
            remove_tree(self._folder(step))
            return
        # Under this name it is known as a leftover, whichever of its files are still there after a
        # kill.
        remove_tree(rename(self._folder(step), self.directory / f"{step}.deleted"))

    def _clean(self) -> None:
        """Removes leftovers: temporary folders, and steps of Orbax (or empty ones) that have no
        manifest. Nothing else.
        """
        for path in self.directory.glob("*") if self._first else ():
            unfinished = path.name.isdecimal() and path.is_dir() and not (path / MANIFEST).exists()
            if LEFTOVER.fullmatch(path.name) or (
                unfinished and ((path / MADE_BY_ORBAX).exists() or not any(path.iterdir()))
            ):
                remove_tree(path)

    def _pass_over(self, step: int, error: DamagedError) -> None:
        aside = self.directory / f"{step}.damaged"
        while aside.exists():
            aside = aside.with_name(f"{aside.name}+")
        rename(self._folder(step), aside)
        say(f"warning: {error}; set aside as {aside.name}")
