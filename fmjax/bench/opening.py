"""Time and memory of opening data, with an empty cache and again: `python -m fmjax.bench.opening`.

Each open is a process of its own, which opens the files as a run does, asks where the last record
is, and reads it. Time is without imports; memory is what the process allocates at most meanwhile,
without the pages of mapped files, which the system takes back when it needs them. Generated files
go to a temporary folder, which takes 1.1 GB at most. Names of cases measure those alone.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
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
    with (path / "a.csv").open("w", encoding="utf-8") as stream:
        stream.write("text,label\n")
        for number in range(50_000):
            quoted = text(number, 200).replace('"', '""')
            stream.write(f'"{quoted}",{number % 5}\n')
    return "a.csv"


def jsonl(path: Path) -> str:
    """500,000 records, 1 GB"""
    with (path / "a.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(500_000):
            stream.write(json.dumps({"text": text(number, 1900), "label": number % 5}) + "\n")
    return "a.jsonl"


def lines(path: Path) -> str:
    """5,000,000 paragraphs, 1 GB"""
    with (path / "a.txt").open("w", encoding="utf-8") as stream:
        for number in range(5_000_000):
            stream.write(text(number, 180) + "\n\n")
    return "a.txt"


def image(number: int) -> bytes:
    """Returns a PNG of 16 x 16 pixels."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (number % 251, number % 241, number % 239)).save(stream, "PNG")
    return stream.getvalue()


def class_folders(path: Path) -> str:
    """50,000 images in 100 class folders"""
    for label in range(100):
        (path / "images" / f"class {label}").mkdir(parents=True)
    for number in range(50_000):
        name = path / "images" / f"class {number % 100}" / f"{number:06}.png"
        name.write_bytes(image(number))
    return "images"


def write_tar(path: Path, count: int, files: Callable[[int], dict[str, bytes]]) -> str:
    """Writes an archive of the files of that many numbers."""
    with tarfile.open(path / "a.tar", "w") as archive:
        for number in range(count):
            for name, content in files(number).items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
                archive.members.clear()  # type: ignore[attr-defined]  # they would fill the memory
    return "a.tar"


def archive_folders(path: Path) -> str:
    """50,000 images in an archive of 100 class folders"""
    return write_tar(path, 50_000, lambda n: {f"class {n % 100}/{n:06}.png": image(n)})


def webdataset(path: Path) -> str:
    """50,000 records of a text and a label in a tar"""
    return write_tar(
        path,
        50_000,
        lambda n: {f"{n:06}.cls": str(n % 5).encode(), f"{n:06}.txt": text(n, 200).encode()},
    )


def million(path: Path) -> str:
    """1,000,000 small texts in a tar, 1 GB"""
    return write_tar(path, 1_000_000, lambda n: {f"{n:07}.txt": SENTENCE.format(n).encode()})


def coco(path: Path) -> str:
    """200,000 images with 1,000,000 annotations in a JSON file, 1 GB"""
    polygon = [[float(place) + 0.25 for place in range(100)]]
    with (path / "a.json").open("w", encoding="utf-8") as stream:
        stream.write('{"categories": [{"id": 1, "name": "cat"}], "images": [')
        for number in range(200_000):
            found = {"id": number, "file_name": f"{number}.jpg", "height": 480, "width": 640}
            stream.write(", " * (number > 0) + json.dumps(found))
        stream.write('], "annotations": [')
        for number in range(1_000_000):
            found = {"id": number, "image_id": number // 5, "category_id": 1}
            found |= {"bbox": [1, 2, 3, 4], "segmentation": polygon}
            stream.write(", " * (number > 0) + json.dumps(found))
        stream.write("]}")
    return "a.json"


CASES: dict[str, Callable[[Path], str]] = {
    "csv": csv,
    "jsonl": jsonl,
    "text": lines,
    "folders": class_folders,
    "folders.tar": archive_folders,
    "tar": webdataset,
    "million.tar": million,
    "json": coco,
}


def anonymous() -> int:
    """Returns the bytes of memory that this process has allocated."""
    with open("/proc/self/status", encoding="utf-8") as status:
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
    source = open_source("json" if files.endswith(".json") else "auto", files, "train")
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
            run = subprocess.run(
                command, env=env, capture_output=True, encoding="utf-8", check=True
            )
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
