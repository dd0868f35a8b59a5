"""Temporary folders that a later process removes if their own was killed.

The name of a folder says which process made it: fmjax-logs-MACHINE-PID-STARTED-xxxxxxxx.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = re.compile(r"fmjax-[a-z]+-([0-9a-f]{12})-(\d+)-(\d+)-\w+")


def make(kind: str) -> Path:
    """Returns a new temporary folder. Removes those of processes of this machine that have ended.

    Args:
      kind: lower-case letters in its name.
    """
    remove_left()
    pid = os.getpid()
    name = f"fmjax-{kind}-{machine_digest()}-{pid}-{started(pid) or 0}-"
    return Path(tempfile.mkdtemp(prefix=name))


@contextmanager
def folder(kind: str) -> Iterator[Path]:
    """Gives a temporary folder for the length of the block."""
    made = make(kind)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def remove_left() -> None:
    """Removes the temporary folders of processes of this machine that have ended."""
    if not machine():
        return
    for path in Path(tempfile.gettempdir()).glob("fmjax-*"):
        found = NAME.fullmatch(path.name)
        if found and found[1] == machine_digest() and started(int(found[2])) != found[3]:
            shutil.rmtree(path, ignore_errors=True)


def machine_digest() -> str:
    return hashlib.sha256(machine().encode()).hexdigest()[:12]


def machine() -> str:
    """Returns what identifies this machine since it was started, and the container in which
    process numbers count; empty where there is no /proc.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def started(pid: int) -> str:
    """Returns when a process was started, in ticks since the machine was; empty if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()  # the name before may have spaces
    return "" if state in "ZX" else fields[18]
