"""Checkpoints of a run: saved by Orbax in the background, sealed with a manifest, verified before
they are used.

    checkpoints/20/params/ opt_state/ step/   one Orbax item each: evaluation reads `params` alone
    checkpoints/20/manifest.json              items, data, metrics; SHA-256 and size of every file
    checkpoints/10.damaged/                   set aside, for a person to look at

In a bucket Orbax writes the objects of a step in place, and a file that commits them. Each start of
a run writes to a folder of its own, checkpoints/20/ATTEMPT/params, which the manifest names: a
process that was stopped, and whose run was taken over meanwhile, cannot write into a step of the
new owner. The manifest has the digests that the bucket gives for its objects, and those of the
arrays in memory.

The manifest is written last. Orbax restores files with flipped bits silently and takes an empty
folder for a step; hence the manifest. A step without one does not exist: it is being written, being
deleted, or was left by a kill. Items are stored as nested dictionaries by name (`fmjax.pytree`), so
no optimizer class is needed to read them.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from fmjax.contracts import Config, PyTree
from fmjax.distributed import hosts
from fmjax.distributed.hosts import say
from fmjax.errors import UserError
from fmjax.filesystems.buckets import BucketPath
from fmjax.filesystems.paths import RunPath, remove_tree, rename
from fmjax.filesystems.patience import OUTAGE, PATIENCE
from fmjax.runs import array_digests, orbax_items
from fmjax.runs.checkpoint_reader import Best, CheckpointReader, ending
from fmjax.runs.lock import TakenOver
from fmjax.runs.manifest import (
    MANIFEST,
    DamagedError,
    Manifest,
    describe,
    flat,
    list_files,
    read_manifest,
    write_manifest,
)

MADE_BY_ORBAX = "_CHECKPOINT_METADATA"
Digests: TypeAlias = tuple[Sequence[str], PyTree]  # names of arrays, and their digests
LOOK = 1.0  # seconds between two looks at a save that is waited for
LEFTOVER = re.compile(r"\d+\.(deleted|orbax-checkpoint-tmp.*)")


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
        in_bucket = isinstance(self.directory, BucketPath)
        self._attempt = f"{hosts.of_first(secrets.randbits(31)):08x}" if in_bucket else ""
        self._clean()
        hosts.meet("checkpoints")
        self._orbax = orbax_items.writer()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._abandoned = False  # whether a save is left to itself, as the bucket does not answer

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
            orbax_items.start(self._orbax, self._folder(step) / self._attempt, trees)
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
        (step, future), self._pending = self._pending, None
        while wait_for([future], LOOK).not_done:
            if isinstance(self.directory, BucketPath) and OUTAGE.lasts():
                self._abandoned = True
                silence = OSError(f"the bucket has not answered for {PATIENCE:.0f} s")
                raise self._failed(step, silence)
        error = future.exception()
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
            self._thread.shutdown(wait=not self._abandoned)
            if not self._abandoned:
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
            content = content | {"arrays": arrays, "attempt": self._attempt}
        content = content | {"files": list_files(folder / self._attempt)}
        try:
            write_manifest(folder, content, new=True)
        except FileExistsError:  # that of a process whose run was taken over, or ours
            self._before_seal()
            write_manifest(folder, content)
        try:
            kept = {*self.steps()[-self._keep :], *self._ranked()[:1]}
            for old in set(self.steps()) - kept:
                self._delete(old)
        except (OSError, UserError) as error:  # this step is saved all the same
            say(
                f"warning: {self.directory}: old checkpoints could not be removed ({ending(error)})"
            )

    def _failed(self, step: int, error: BaseException) -> NotSaved:
        reason = ending(error)
        if isinstance(self.directory, BucketPath):
            if self._first and not OUTAGE.lasts():
                with suppress(OSError, UserError):  # of a bucket that denies access
                    self._remove_attempt(step)
            return NotSaved(
                f"{self._folder(step)}: the checkpoint could not be written ({reason}); fix the "
                "permissions of the bucket or the network, then the same command continues"
            )
        found: list[int] = []
        with suppress(OSError, UserError):
            self._clean()
            found = self.steps()
        return NotSaved(
            f"{self._folder(step)}: the checkpoint could not be written ({reason}); free disk "
            "space or fix its permissions, then the same command continues "
            f"{f'from step {found[-1]}' if found else 'from the start'}"
        )

    def _remove_attempt(self, step: int) -> None:
        """Removes what this process wrote of a step, unless the step is sealed with it."""
        folder, sealed = self._folder(step), {}
        with suppress(FileNotFoundError):
            sealed = read_manifest(folder)
        if sealed.get("attempt") != self._attempt:
            # Nothing else: the run may be another process's by now.
            remove_tree(folder / self._attempt)

    def _delete(self, step: int) -> None:
        (self._folder(step) / MANIFEST).unlink(missing_ok=True)
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
                unfinished
                and (
                    (path / MADE_BY_ORBAX).exists()
                    or any(path.glob(f"*/{MADE_BY_ORBAX}"))
                    or not any(path.iterdir())
                )
            ):
                remove_tree(path)

    def _pass_over(self, step: int, error: DamagedError) -> None:
        aside = self.directory / f"{step}.damaged"
        while aside.exists():
            aside = aside.with_name(f"{aside.name}+")
        rename(self._folder(step), aside)
        say(f"warning: {error}; set aside as {aside.name}")
