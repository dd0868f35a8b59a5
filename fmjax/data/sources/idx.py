"""Labeled images in arrays: MNIST's idx files, and the digits that scikit-learn ships.

A record is `{"image": uint8 [H,W,C], "label": int}`. The files are memory-mapped (`mapped.py`), and
compressed ones are decompressed once into the cache.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

import numpy as np

from fmjax.contracts import Record
from fmjax.data.records import RecordSource, scrambled
from fmjax.data.sources.kinds import (
    BY_NAME,
    NO,
    Files,
    SourceKind,
    check_split,
    first_path,
    one_path,
)
from fmjax.data.storage.mapped import File
from fmjax.data.storage.tar import ARCHIVE_EXTENSIONS
from fmjax.errors import UserError

IDX_IMAGES = re.compile(r"images[-.]idx3", re.IGNORECASE)
MOST_BYTES = 8 * 2**30  # of a decompressed file
DIGITS = {"train": 1297, "validation": 200, "test": 300}  # images of each split


class Images(RecordSource):
    """Images, uint8 [N,H,W,C], and labels, [N].

    `name` says where they come from; `mark` is the fingerprint.
    """

    columns = ("image", "label")

    def __init__(self, images: np.ndarray, labels: np.ndarray, name: str, mark: Record):
        self.images, self.labels, self.name, self.mark = images, labels, name, mark

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def where(self, index: int) -> str:
        return f"{self.name} image {index}"

    def fingerprint(self) -> Record:
        return self.mark


class Idx(Images):
    """The images of an idx file and the labels of another, both memory-mapped and pickled by their
    paths.

    Raises UserError if one is not such a file or is truncated, if they differ in length, and if
    they are empty.
    """

    def __init__(self, images: File, labels: File, split: str, mark: Record | None = None):
        """`mark` is the fingerprint, if known."""
        pixels, numbers = idx_array(images, 3), idx_array(labels, 1)
        if len(pixels) != len(numbers):
            raise UserError(
                f"{labels.path}: has {len(numbers)} labels for the {len(pixels)} images of "
                f"{images.path.name}; fetch both again"
            )
        if not len(pixels):
            raise UserError(f"{images.path}: no images for {split}; use a file that is not empty")
        self.files, self.split = (images, labels), split
        mark = mark or {
            "source": "idx",
            "split": split,
            "files": [file.fingerprint for file in self.files],
        }
        super().__init__(pixels[:, :, :, None], numbers, images.path.name, mark)

    def __reduce__(self) -> tuple[type[Idx], tuple[File, File, str, Record]]:
        return Idx, (*self.files, self.split, self.mark)


def is_idx(files: Files) -> int:
    """Returns the certainty that files are idx files, or a folder of them."""
    first = first_path(files)
    if first.name.lower().endswith(ARCHIVE_EXTENSIONS):
        return NO
    inside = first.iterdir() if first.is_dir() else ()
    return BY_NAME if any(IDX_IMAGES.search(path.name) for path in (first, *inside)) else NO


def open_idx(files: Files, split: str) -> Idx:
    """Returns the images of an idx file and the labels in the file beside it; in a folder, those of
    the split, or t10k for splits other than train. Raises UserError if they cannot be read."""
    path = one_path(files, split, "idx")
    if path.is_dir():
        begins = "train" if split == "train" else ("t10k", "test")
        found = sorted(
            file
            for file in path.iterdir()
            if IDX_IMAGES.search(file.name) and file.name.lower().startswith(begins)
        )
        if not found:
            raise UserError(
                f"{path}: has no idx file of images for {split}; set "
                f"--config.data.files.{split}=FILE"
            )
        path = found[0]
    return Idx(File(path, most=MOST_BYTES), File(beside(path), most=MOST_BYTES), split)


def beside(path: Path) -> Path:
    """Returns the file of labels that goes with an idx file of images.

    Raises UserError if it is not there.
    """
    if not IDX_IMAGES.search(path.name):
        raise UserError(
            f"{path}: is not named like an idx file of images (train-images-idx3-ubyte.gz); name "
            "the file of the images"
        )
    plain = re.sub(r"\.gz$", "", path.name, flags=re.IGNORECASE)
    tried = [
        IDX_IMAGES.sub(f"labels{mark}idx1", plain) + packed
        for mark in "-."
        for packed in (".gz", "")
    ]
    tried = [name.upper() for name in tried] if plain.isupper() else tried
    files = [file for file in path.parent.iterdir() if file.is_file()]
    there = {file.name.lower(): file for file in files} | {file.name: file for file in files}
    for name in (*tried, *map(str.lower, tried)):  # the same case is preferred
        if name in there:
            return there[name]
    raise UserError(
        f"{path}: the file of its labels, {tried[0]} or {tried[1]}, is not in the same folder; put "
        "it there"
    )


def idx_array(file: File, axes: int) -> np.ndarray:
    """Returns the array of an idx file of bytes with that many axes, a view of the mapped file.

    Raises UserError if the file does not begin like an idx file, or its length differs from its
    header.
    """
    begin = 4 + 4 * axes
    head = file.data[:begin]
    if len(head) < begin or head[:4] != bytes([0, 0, 8, axes]):
        raise UserError(
            f"{file.path}: begins with {head[:4].hex(' ') or 'nothing'}, not 00 00 08 0{axes} as "
            "an idx file of "
            f"{'images' if axes == 3 else 'labels'} does; name the right file, or fetch it again"
        )
    shape = tuple(int(size) for size in np.frombuffer(head[4:], ">u4"))
    count, found = int(np.prod(shape, dtype=object)), len(file.data) - begin
    if found != count:
        raise UserError(
            f"{file.path}: its header promises {count:,} bytes, but it has {found:,}; fetch it "
            "again"
        )
    return np.frombuffer(file.data, np.uint8, offset=begin).reshape(shape)


def open_digits(files: None, split: str) -> Images:
    """Returns a split of scikit-learn's 1,797 handwritten digits of 8 x 8 pixels (the test set of
    UCI's optdigits).

    Raises UserError for an unknown split.
    """
    check_split("digits", split, DIGITS)
    images, labels = all_digits()
    ends = np.cumsum(list(DIGITS.values()))
    begin = int(ends[list(DIGITS).index(split)]) - DIGITS[split]
    chosen = np.sort(
        np.argsort(scrambled(len(images)), kind="stable")[begin : begin + DIGITS[split]]
    )
    mark = {
        "source": "digits",
        "split": split,
        "sha256": hashlib.sha256(images[chosen].tobytes()).hexdigest(),
    }
    return Images(images[chosen], labels[chosen], f"digits {split}", mark)


@functools.cache
def all_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, uint8 [N,8,8,1], and labels [N] of scikit-learn's digits, whose gray
    values run from 0 to 16."""
    from sklearn.datasets import load_digits  # imported here because the import takes a moment

    found = load_digits()
    return np.rint(found.images[:, :, :, None] * (255 / 16)).astype(np.uint8), found.target


SOURCES = (
    SourceKind("idx", open_idx, reads="folder", recognizes=is_idx),
    SourceKind("digits", open_digits, reads="nothing"),
)
