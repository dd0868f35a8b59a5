"""The logs of a run: `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from tensorboardX import SummaryWriter

from fmjax.config.json_files import to_line, write_atomically
from fmjax.contracts import Record
from fmjax.filesystems.buckets import BucketPath
from fmjax.filesystems.paths import RunPath
from fmjax.runs.spool import Spool

METRICS = "metrics.jsonl"
EVALUATION = "eval/validation/"  # prefix of the names of validation metrics


def read_metrics(workdir: RunPath) -> list[Record]:
    """Returns the records of `metrics.jsonl`, none if there is no such file.

    A line that was truncated by a kill is left out.
    """
    path = workdir / METRICS
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class MetricsLog:
    """Writes metrics to `metrics.jsonl` and TensorBoard.

    Opening it truncates both to the step that a run resumes from. In a bucket, `check` is called
    before files are uploaded; it raises UserError if that is not allowed any more.
    """

    def __init__(self, workdir: RunPath, step: int, check: Callable[[], None] = lambda: None):
        kept = [record for record in read_metrics(workdir) if record["step"] <= step]
        self._spool: Spool | None = None
        if isinstance(workdir, BucketPath):
            self._spool = Spool(workdir, check)
            workdir = self._spool.folder
        write_atomically(workdir / METRICS, "".join(to_line(record) + "\n" for record in kept))
        # Closed by close().
        self._file = open(workdir / METRICS, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        # TensorBoard itself drops events of earlier files past purge_step.
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends {"step": step, **values} as one line, NaN and infinity as null."""
        self._file.write(to_line({"step": step} | dict(values)) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def upload(self) -> None:
        """Uploads what was written so far, if the run is in a bucket.

        Raises OSError if that fails.
        """
        if self._spool:
            self._board.flush()
            self._spool.upload()

    def close(self, upload: bool = True) -> None:
        """Ends the log, in a bucket with all that was written unless told otherwise."""
        self._file.close()
        self._board.close()
        if self._spool:
            self._spool.close(upload)
