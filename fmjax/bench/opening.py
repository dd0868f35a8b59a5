"""Time and memory of opening data, with an empty cache and again: `python -m fmjax.bench.opening`.

Each open is a process of its own, which opens the files as a run does, asks where the last record
is, and reads it. Time is without imports; memory is what the process allocates at most meanwhile,
without the pages of mapped files, which the system takes back when it needs them. Generated files
go to a temporary folder (2.5 GB for all). Names of cases measure those alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fmjax.bench.table import markdown
from fmjax.contracts import Record
from fmjax.errors import one_of

SENTENCE = 'The quick brown fox, number {}, jumps over the "lazy" dog. '


def text(number: int, size: int) -> str:
    """Returns a text of about that many characters."""
    sentence = SENTENCE.format(number)
    return sentence * (size // len(sentence) + 1)


def csv(path: Path) -> str:
    """50,000 rows, 13 MB"""
    with (path / "a.csv").open("w") as stream:
        stream.write("text,label\n")
        for number in range(50_000):
            quoted = text(number, 200).replace('"', '""')
            stream.write(f'"{quoted}",{number % 5}\n')
    return "a.csv"


def jsonl(path: Path) -> str:
    """500,000 records, 1 GB"""
    with (path / "a.jsonl").open("w") as stream:
        for number in range(500_000):
            stream.write(json.dumps({"text": text(number, 1900), "label": number % 5}) + "\n")
    return "a.jsonl"


def lines(path: Path) -> str:
    """5,000,000 paragraphs, 1 GB"""
    with (path / "a.txt").open("w") as stream:
        for number in range(5_000_000):
            stream.write(text(number, 180) + "\n\n")
    return "a.txt"


CASES: dict[str, Callable[[Path], str]] = {"csv": csv, "jsonl": jsonl, "text": lines}


def anonymous() -> int:
    """Returns the bytes of memory that this process has allocated."""
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def opened(files: str) -> Record:
    """Returns the seconds and bytes that opening files takes in this process."""
    from fmjax.data.sources.open import open_source

    most = before = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    source = open_source("auto", files, "train")
    source.where(len(source) - 1)
    assert source[len(source) - 1]
    seconds = time.perf_counter() - begun
    done.set()
    watcher.join()
    return {"seconds": seconds, "bytes": most - before, "records": len(source)}


def measured(name: str) -> Sequence[str]:
    """Returns the row of the table for a case: seconds and megabytes of two opens."""
    make = CASES[name]
    folder = Path(tempfile.mkdtemp(prefix="fmjax-opening-"))
    try:
        files = folder / make(folder)
        time.sleep(3)  # a file that has just been written is not trusted
        env = {**os.environ, "FMJAX_CACHE": str(folder / "cache")}
        command = [sys.executable, "-m", "fmjax.bench.opening", "--child", str(files)]
        found = []
        for _ in range(2):
            run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            found.append(json.loads(run.stdout))
    finally:
        shutil.rmtree(folder)
    about = f"{name}: {make.__doc__}"
    return (
        about,
        *(f"{each['seconds']:.2f} s, {each['bytes'] / 2**20:.0f} MB" for each in found),
    )


def main(argv: Sequence[str]) -> None:
    if argv[:1] == ["--child"]:
        print(json.dumps(opened(argv[1])))
        return
    for name in argv:
        one_of("CASE", name, CASES)
    rows = [measured(name) for name in argv or CASES]
    print(markdown(("data", "first open", "second open"), rows))


if __name__ == "__main__":
    main(sys.argv[1:])
