"""One process trains in a run directory: a lock on a file, or an object of a bucket with a
heartbeat.

The object is written only if it is still the one that was read, so if two processes take it, one
fails. It names the process that holds the lock; `{}` means that none does. It is taken over from a
process of this machine that has ended, and from any that has not written for a while.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from fmjax.contracts import Record
from fmjax.distributed.hosts import say
from fmjax.errors import UserError
from fmjax.filesystems.buckets import BucketPath
from fmjax.filesystems.paths import RunPath
from fmjax.filesystems.scratch import machine, started

LOCK = ".lock"
HEARTBEAT = 10.0  # seconds between two writes
# Seconds without one, after which a process counts as dead: more than REPLY of `patience`, after
# which a write whose connection hangs is repeated. The waiting process measures them; no clocks are
# compared.
STALE = 90.0
FRESH = 2.0  # after a write, the lock is known to be held; a bucket takes one per second
UNKNOWN: Record = {"host": "an unknown host"}
LOOK = 1.0  # seconds between two looks at a lock that someone holds


class TakenOver(UserError):
    """Another process has the lock now; this one must not write any more."""


class Lock:
    """A lock that is held. That of a file cannot be lost."""

    lost = False  # whether another process is known to have taken the run over

    def check(self, now: bool = False) -> None:
        """Raises TakenOver if another process has taken the run over.

        Unless asked for `now`, believes what was found up to FRESH seconds ago.
        """

    def release(self) -> None:
        """Frees the lock."""


class BucketLock(Lock):
    """The lock of a run in a bucket; a thread writes its heartbeat."""

    def __init__(self, workdir: BucketPath):
        """Takes the lock.

        Raises UserError if another process holds it, or if it cannot be written or replaced.
        """
        self.workdir, self.path = workdir, workdir / LOCK
        self.owner = this_process()
        self._mutex, self._end = threading.Lock(), threading.Event()
        self.lost, self._released, self._written = False, False, 0.0
        holder, self._generation = self._read()
        if holder and not has_ended(holder):
            self._watch(holder)
        try:
            self._write(self.owner)
        except PermissionError as error:
            raise UserError(
                f"--workdir={workdir}: cannot be written to ({error.strerror}); get the role "
                "Storage Object User for the bucket, or name another"
            ) from None
        if self.lost:
            raise self._held(self._read()[0] or holder)
        if holder:
            say(f"{workdir}: took the run over from {named(holder)}, which has ended")
        if self.path.stat().retained:
            raise UserError(
                f"--workdir={workdir}: the bucket has a retention policy, but the files of a run "
                "are replaced as it goes on; name a bucket without one"
            )
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def check(self, now: bool = False) -> None:
        """As `Lock.check`; also raises TakenOver if this process has freed the lock, as it does
        when it ends because of another host.

        Raises OSError if the lock may be lost and that cannot be found out.
        """
        if now or time.monotonic() - self._written >= FRESH:
            try:
                self._write(self.owner)
            except (OSError, UserError):
                if time.monotonic() - self._written >= STALE:
                    raise
                return  # what is written next says it better
        if self._released:
            raise TakenOver(f"{self.workdir}: this process has freed the run; it writes no more")
        if self.lost:
            raise TakenOver(
                f"{self.workdir}: another process has taken the run over, since this one had not "
                f"renewed its lock for {STALE:.0f} s; nothing more is written here"
            )

    def release(self) -> None:
        """Ends the heartbeat and frees the lock."""
        self._end.set()
        self._thread.join()
        with self._mutex:
            self._released = True
        try:
            self._write({})
        except (OSError, UserError):
            say(f"warning: {self.path} could not be freed; it will be stale in {STALE:.0f} s")

    def _beat(self) -> None:
        while not self._end.wait(HEARTBEAT) and not self.lost:
            try:
                self._write(self.owner)
            except (OSError, UserError):
                continue  # the next may get through; if not for long, the lock is lost

    def _write(self, owner: Record) -> None:
        """Writes the lock unless it is lost, and notes whether it is. A lock that was freed is not
        taken again.
        """
        with self._mutex:
            if self.lost or (self._released and owner):
                return
            try:
                content = json.dumps(owner).encode()
                self._generation = self.path.write_bytes(content, generation=self._generation)
            except FileExistsError:
                # A request whose answer was lost may have written it: then it is ours.
                found, self._generation = self._read()
                self.lost = found != owner
            self._written = time.monotonic()

    def _read(self) -> tuple[Record, int]:
        """Returns the holder, {} if there is none, and the generation of the object.

        An empty object was copied with a local run. Any other that is no lock of ours may be held
        by another version of fmjax: its holder is unknown.
        """
        try:
            content, generation = self.path.read_version()
        except FileNotFoundError:
            return {}, 0
        try:
            holder = json.loads(content or b"{}")
        except ValueError:
            holder = None
        return holder if isinstance(holder, dict) else UNKNOWN, generation

    def _watch(self, holder: Record) -> None:
        """Returns when the holder counts as dead. Raises UserError when it writes its heartbeat."""
        say(
            f"{self.workdir}: {named(holder)} has the lock; waiting up to {STALE:.0f} s to see "
            "whether it still runs"
        )
        begun = time.monotonic()
        while time.monotonic() - begun < STALE:
            time.sleep(LOOK)
            found, generation = self._read()
            if not found:  # it has just ended
                self._generation = generation
                return
            if generation != self._generation:
                raise self._held(found)

    def _held(self, holder: Record) -> UserError:
        return UserError(
            f"--workdir={self.workdir}: another process is training in it ({named(holder)}); wait "
            "for it, or name another folder"
        )


@contextmanager
def locked(workdir: RunPath) -> Iterator[Lock]:
    """Locks the run directory for this process.

    Raises UserError if another process is training in it, or it cannot be written.
    """
    if isinstance(workdir, BucketPath):
        lock = BucketLock(workdir)
        try:
            yield lock
        finally:
            lock.release()
        return
    with open(workdir / LOCK, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--workdir={workdir}: another process is training in it; wait for it, or name "
                "another folder"
            ) from None
        yield Lock()


def this_process() -> Record:
    """Returns what identifies this process among those of all hosts."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "machine": machine(),
        "started": started(pid),
        "token": uuid.uuid4().hex,
    }


def named(holder: Record) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"


def has_ended(holder: Record) -> bool:
    """Returns whether a process ran on this machine and has ended; False if that is unknown."""
    here = machine()
    if not here or holder.get("machine") != here or not isinstance(holder.get("pid"), int):
        return False
    return started(holder["pid"]) != holder.get("started")
