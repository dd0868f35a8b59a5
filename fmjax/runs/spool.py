"""The logs of a run in a bucket: files that grow here and are uploaded whole, as objects cannot be
appended to.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from fmjax.errors import UserError
from fmjax.filesystems import scratch
from fmjax.filesystems.buckets import BucketPath

EVERY = 5.0  # seconds between two uploads
SHARE = 20  # of the time between two uploads one may take: large files are uploaded less often


class Spool:
    """A local folder whose files a thread uploads when they have changed.

    Args:
      target: the folder of the bucket.
      check: is called before files are uploaded; raises UserError if that is not allowed any more.
    """

    def __init__(self, target: BucketPath, check: Callable[[], None] = lambda: None):
        self.target, self.check = target, check
        self.folder = scratch.make("logs")
        self._uploaded: dict[Path, tuple[int, int]] = {}
        self._mutex, self._end = threading.Lock(), threading.Event()
        self._pause = EVERY
        self._thread = threading.Thread(target=self._work, name="spool", daemon=True)
        self._thread.start()

    def upload(self) -> None:
        """Uploads the files that have changed.

        Raises OSError if one cannot be written, and UserError as `check` does.
        """
        with self._mutex:
            for path in sorted(self.folder.rglob("*")):
                state = path.stat()
                seen = state.st_size, state.st_mtime_ns
                if path.is_file() and self._uploaded.get(path) != seen:
                    name = path.relative_to(self.folder).as_posix()
                    self.check()
                    (self.target / name).write_bytes(path.read_bytes())
                    self._uploaded[path] = seen

    def close(self, upload: bool = True) -> None:
        """Uploads what is left, and removes the local folder; unless told to upload, waits for
        nothing, as the bucket may not answer.
        """
        self._end.set()
        if upload:
            self._thread.join()
            self.upload()
        with self._mutex if upload else nullcontext():  # the thread of checkpoints may be uploading
            shutil.rmtree(self.folder, ignore_errors=True)

    def _work(self) -> None:
        while not self._end.wait(self._pause):
            begun = time.monotonic()
            # One that fails is tried again; a checkpoint or the end of the run reports it.
            with contextlib.suppress(OSError, UserError):
                self.upload()
            self._pause = max(EVERY, SHARE * (time.monotonic() - begun))
