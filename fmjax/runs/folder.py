"""The run directory: what may be one, and the provenance of its contents.

`config.json` (resolved), `provenance.json`, `tokenizer/`, `processors/`, `checkpoints/`,
`metrics.jsonl`, `tensorboard/`, `report.html`.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import jax

from fmjax.config import is_run
from fmjax.config.json_files import read_json, write_json
from fmjax.contracts import Config
from fmjax.data.sources.kinds import kinds
from fmjax.data.storage import fingerprints
from fmjax.data.storage.fingerprints import data_differences, with_digests
from fmjax.distributed import hosts
from fmjax.distributed.alarm import ending_together
from fmjax.errors import UserError
from fmjax.filesystems.buckets import BucketPath
from fmjax.filesystems.paths import RunPath, explained
from fmjax.runs.lock import LOCK, Lock, locked

CONFIG, PROVENANCE, TOKENIZER, CHECKPOINTS = (
    "config.json",
    "provenance.json",
    "tokenizer",
    "checkpoints",
)
PROCESSORS = "processors"
PACKAGES = (
    "fmjax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tokenizers",
    "sentencepiece",
    "numpy",
)


def check_workdir(workdir: RunPath) -> bool:
    """Returns whether the folder has a run to continue. Creates it if it is missing.

    Raises UserError if it is not writable, or has content that is not a run, and OSError if a
    bucket does not answer.
    """
    if isinstance(workdir, BucketPath):
        workdir.check()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in workdir.iterdir()}
        run = is_run(workdir)
        if run or has_failed_start(workdir) or not found:
            if isinstance(workdir, Path):
                (workdir / LOCK).touch()
            return run
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--workdir={workdir}: is a file, not a folder; name another") from None
    except OSError as error:
        if isinstance(workdir, BucketPath):
            raise
        raise UserError(
            f"--workdir={workdir}: cannot be written to ({error.strerror}); name another"
        ) from None
    listed = ", ".join(sorted(found - {LOCK})[:3])
    raise UserError(
        f"--workdir={workdir}: is not empty ({listed}) and does not contain a run of fmjax; name a "
        "new folder"
    )


def has_failed_start(folder: RunPath) -> bool:
    """Returns whether a folder holds only what a run leaves that ended before its config was
    written."""
    own = {LOCK, TOKENIZER, PROCESSORS, PROVENANCE, f"{PROVENANCE}.new", f"{CONFIG}.new"}
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return LOCK in found and found <= own  # only where there is a lock is it ours


@contextmanager
def entered(workdir: RunPath) -> Iterator[Lock]:
    """Checks the run directory and, on the first host, locks it for the length of the block. If a
    host leaves the block with an error, all hosts end.

    Raises UserError like `check_workdir` and `locked`, and if a request to a bucket fails.
    """
    with ExitStack() as stack, ending_together(stack.close), explained():
        check_workdir(workdir)
        yield stack.enter_context(locked(workdir) if hosts.first() else nullcontext(Lock()))


def read_provenance(workdir: RunPath) -> Config:
    """Returns the content of `provenance.json`; empty if there is none."""
    path = workdir / PROVENANCE
    return read_json(path) if path.exists() else {}


def left_out(workdir: RunPath) -> tuple[str, ...]:
    """Returns the bad records that the run has skipped so far."""
    return tuple(read_provenance(workdir).get("left_out", ()))


def record_left_out(workdir: RunPath, records: list[str]) -> None:
    """Stores the bad records that have been skipped."""
    if records:
        write_json(workdir / PROVENANCE, read_provenance(workdir) | {"left_out": records})


def record(workdir: RunPath, data: Config, notes: Config | None = None) -> None:
    """Writes `provenance.json`: the data's fingerprints and notes about them, and for each start
    the command, versions, device and time.
    """
    start = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    before = read_provenance(workdir)
    kept = with_digests(data, before.get("data", {}))
    content = before | (notes or {}) | {"data": kept, "starts": [*before.get("starts", []), start]}
    write_json(workdir / PROVENANCE, content)


def record_end(
    workdir: RunPath, seconds: float, examples: dict[str, int], repeated: int = 0
) -> None:
    """Stores in `provenance.json` how long the latest start has trained, on how many examples, and
    how many requests to a bucket it has repeated.
    """
    content = read_provenance(workdir)
    *before, last = content["starts"]
    ended = {"seconds": round(seconds, 1)} | ({"repeated_requests": repeated} if repeated else {})
    starts = [*before, last | ended]
    write_json(workdir / PROVENANCE, content | {"starts": starts, "examples": examples})


def needs_contents(workdir: RunPath, data: Config) -> bool:
    """Returns whether a run's data can be compared only if they are read as a whole, since the run
    has stored other digests than those that are known of them anyway. `data` is the config's
    section."""
    named = json.dumps([data.get("files"), data.get("mixture")], default=str)
    by_range = [kind.name for kind in kinds().values() if kind.ranged]
    stored = read_provenance(workdir).get("data", {})
    return fingerprints.needs_contents(stored, by_range, "://" in named)


def check_same_data(workdir: RunPath, data: Config) -> None:
    """Raises UserError, with the differences, if the data has changed since the run started."""
    stored = read_provenance(workdir).get("data", {})
    if PROCESSORS not in stored:  # the run is older than stored processors
        data = {name: value for name, value in data.items() if name != PROCESSORS}
    if changed := data_differences(stored, data):
        raise UserError(
            f"--workdir={workdir}: the data has changed since the run started "
            f"({'; '.join(changed)}); restore it (moving or renaming a file is not a change), or "
            "start a new run in another folder"
        )


def version(package: str) -> str:
    """Returns the installed version, '' if it is not installed as a package (run from a
    checkout).
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """Returns the commit of fmjax: of the checkout that it runs from, or that pip installed it
    from; '' if neither is known.
    """
    checkout = Path(__file__).parents[2]
    # If fmjax is installed in a folder of some project, that is a different repository.
    if git(checkout, "rev-parse", "--show-toplevel") == str(checkout.resolve()):
        return git(checkout, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        origin = importlib.metadata.distribution("fmjax").read_text("direct_url.json")
        return str(json.loads(origin or "{}").get("vcs_info", {}).get("commit_id", ""))
    except (importlib.metadata.PackageNotFoundError, ValueError, AttributeError):
        return ""


def git(folder: Path, *words: str) -> str:
    """Returns git's output for the repository of a folder, '' if there is none."""
    # In a git hook, these name the repository of the hook.
    own = ("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE")
    surroundings = {key: value for key, value in os.environ.items() if key not in own}
    try:
        run = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            encoding="utf-8",
            timeout=10,
            env=surroundings,
        )
        return run.stdout.strip() if run.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        return ""
