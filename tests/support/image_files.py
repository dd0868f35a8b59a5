"""Small images in folders, archives and idx files, and whether a source reads them as they are."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fmjax.data.records import Record

RNG = np.random.default_rng(0)
GREYS = RNG.integers(0, 256, (6, 4, 5), np.uint8)
COLOURS = RNG.integers(0, 256, (6, 4, 5, 3), np.uint8)
# File in a tree of class folders -> number of its image, in the order of their names.
CLASSES = {"cat/10.png": 0, "cat/2.PNG": 1, "dog/1.png": 2, "dog/a b.png": 3, "Übel/1.png": 4}
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    """Returns an image as the bytes of a file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


GOOD = encoded(COLOURS[0])


def read(source) -> list[Record]:
    return [source[index] for index in range(len(source))]


def same(source, arrays: Sequence[np.ndarray], labels: Sequence) -> bool:
    records = read(source)
    return [record["label"] for record in records] == list(labels) and all(
        record["image"].dtype == np.uint8 and np.array_equal(record["image"], array)
        for record, array in zip(records, arrays, strict=True)
    )


def write_tree(folder: Path) -> str:
    for name, number in CLASSES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(COLOURS[number]))
    return str(folder)


def write_tar(path: Path, members: Sequence[tuple[str | tarfile.TarInfo, bytes]], mode: str = "w") -> str:
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)
