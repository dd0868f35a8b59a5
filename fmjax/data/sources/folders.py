"""Labeled images in class folders, or in archives of class folders.

A record is `{"image": uint8 [H,W,C], "label": str}`. Archives are memory-mapped (`mapped.py`),
compressed ones are decompressed once into the cache as a whole; members are not extracted. Memory
holds the name of each image, its offsets in an archive (16 bytes), and up to MOST_KEPT bytes of
decoded images, so that small data sets are decoded once. Other images are decoded on each read, so
a damaged one is found only then.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from fmjax.contracts import Record, Value
from fmjax.data.kinds.pixels import decode
from fmjax.data.records import RecordSource
from fmjax.data.sources.idx import MOST_BYTES, is_idx
from fmjax.data.sources.kinds import BY_NAME, NO, Files, SourceKind, first_path, one_path
from fmjax.data.storage.mapped import File
from fmjax.data.storage.paths import IMAGE_EXTENSIONS, is_image
from fmjax.data.storage.tar import ARCHIVE_EXTENSIONS, hidden, members
from fmjax.data.stream.tolerance import tolerates
from fmjax.errors import RecordError, UserError

MOST_FILE = 256 * 2**20  # of one file in an archive
MOST_KEPT = 256 * 2**20  # of the decoded images that a source keeps; CIFAR-10 takes 180 MB
OVERHEAD = 512  # bytes of an array besides its pixels


class Item(NamedTuple):
    """An image file: its name in the archive or folder, its offsets in the archive, or its bytes in
    a folder."""

    name: PurePosixPath
    begin: int = 0
    end: int = 0
    data: bytes = b""


class Names:
    """A list of texts, stored as one byte string plus 8 bytes per text."""

    def __init__(self) -> None:
        self.data, self.ends = bytearray(), array("q", [0])

    def append(self, name: str) -> None:
        self.data += name.encode("utf-8", "surrogateescape")
        self.ends.append(len(self.data))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        return self.data[self.ends[index] : self.ends[index + 1]].decode("utf-8", "surrogateescape")


class ClassFolders(RecordSource):
    """The images of a folder or tar archive of class folders, whose names are the labels; pickled
    without decoded images.

    Raises UserError, naming the member, that is in no folder or outside the archive, is a link or
    larger than MOST_FILE, and for class folders of several splits. A damaged member is an error
    when it is read.
    """

    columns = ("image", "label")

    def __init__(self, path: Path, split: str):
        self.path, self.names, self.spans = path, Names(), array("q")
        self.file = None if path.is_dir() else File(path, most=MOST_BYTES)
        self.kept: dict[int, np.ndarray] = {}  # some of the decoded images, by index
        self.room = MOST_KEPT  # remaining bytes for decoded images
        outer: dict[PurePosixPath, str] = {}
        digest = hashlib.sha256()
        for name, begin, end, data in archive_items(self.file) if self.file else folder_items(path):
            where = f"{path.name}: {name}"
            if len(name.parts) < 2:
                raise UserError(
                    f"{where}: is not in a class folder, so it has no label; move it into one"
                )
            outer.setdefault(name.parent.parent, where)
            if len(outer) > 1:
                others = " and ".join(f"{folder}/" for folder in outer)
                raise UserError(
                    f"{where}: class folders lie in {others}; "
                    "make one folder or archive for each split"
                )
            self.names.append(str(name))
            if self.file:
                self.spans.extend((begin, end))
            else:
                digest.update(f"{name}\0{len(data)}\0".encode() + data)
        if not len(self):
            endings = ", ".join(IMAGE_EXTENSIONS[:4])
            raise UserError(
                f"{path}: no images for {split} ({endings}, ...); use class folders that contain "
                "some"
            )
        folder = {"name": path.name, "size": len(self), "sha256": digest.hexdigest()}
        files = [self.file.fingerprint if self.file else folder]
        self.mark = {"source": "class_folders", "split": split, "files": files}

    def __getstate__(self) -> Record:
        return self.__dict__ | {"kept": {}, "room": MOST_KEPT}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        return {"image": self.image(index), "label": self.label(index)}

    def value(self, index: int, name: str) -> Value:
        """Returns one value of a record: the label without decoding the image."""
        index = range(len(self))[index]
        return self.label(index) if name == "label" else self[index][name]

    def label(self, index: int) -> str:
        return self.names[index].rsplit("/", 2)[-2]

    def image(self, index: int) -> np.ndarray:
        """Returns a decoded image and keeps it while there is room. With shuffled epochs, it does
        not matter which images are kept.

        Raises RecordError if it cannot be read or decoded.
        """
        image = self.kept.get(index)
        if image is None:
            image = decode(self.encoded(index), self.where(index))
            size = image.nbytes + OVERHEAD
            if size <= self.room:
                self.room -= size
                self.kept[index] = image
        return image

    def encoded(self, index: int) -> bytes:
        """Returns the bytes of an image file."""
        if self.file:
            return bytes(self.file.data[self.spans[2 * index] : self.spans[2 * index + 1]])
        try:
            return (self.path / self.names[index]).read_bytes()
        except OSError as error:
            raise RecordError(self.where(index), unreadable(error), index) from None

    def where(self, index: int) -> str:
        return f"{self.path.name}: {self.names[index]}"

    def fingerprint(self) -> Record:
        return self.mark


def is_class_folders(files: Files) -> int:
    """Returns the certainty that files are a folder or an archive of class folders."""
    first = first_path(files)
    if first.name.lower().endswith(ARCHIVE_EXTENSIONS):
        return BY_NAME
    if not first.is_dir() or is_idx(files):
        return NO
    inside = (
        path for folder in sorted(first.iterdir()) if folder.is_dir() for path in folder.iterdir()
    )
    return BY_NAME if any(is_image(path.name) for path in inside) else NO


def open_class_folders(files: Files, split: str) -> ClassFolders:
    """Returns the images of a folder or an archive of class folders.

    Raises UserError if they cannot be read.
    """
    return ClassFolders(one_path(files, split, "class_folders"), split)


def unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror or error}); fix it, or remove it"


def folder_items(path: Path) -> Iterator[Item]:
    """Yields the images under a folder, in the order of their names.

    Raises RecordError for one that cannot be read; if bad records may be skipped, yields it without
    bytes.
    """
    for file in files_under(path, path.name):
        name = PurePosixPath(file.relative_to(path).as_posix())
        if not is_image(file.name) or hidden(name) or file.is_dir():
            continue
        data = b""
        try:
            data = file.read_bytes()
        except OSError as error:
            if not tolerates():
                raise RecordError(f"{path.name}: {name}", unreadable(error)) from None
        yield Item(name, data=data)


def files_under(folder: Path, where: str) -> Iterator[Path]:
    """Yields the files in a folder and its subfolders, in the order of their names. Memory holds
    the names of one folder at a time.

    Links to folders are not followed. Raises UserError for a folder that cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            listed = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    except OSError as error:
        raise UserError(f"{where}: {unreadable(error)}") from None
    for name, is_folder in listed:
        if is_folder:
            yield from files_under(folder / name, f"{where}: {name}")
        else:
            yield folder / name


def archive_items(file: File) -> Iterator[Item]:
    """Yields the images of a tar archive, in its order.

    Raises UserError, naming the member, for members that do not belong there.
    """
    for member in members(file):
        name = PurePosixPath(member.name)
        where = f"{file.path.name}: {member.name}"
        if name.is_absolute() or ".." in name.parts:
            raise UserError(
                f"{where}: would be extracted outside the archive; get an archive that you trust"
            )
        if member.size > MOST_FILE:
            raise UserError(f"{where}: takes more than {MOST_FILE:,} bytes; remove it")
        if not is_image(name.name) or hidden(name) or member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise UserError(
                f"{where}: is a link, a device or sparse, not a file; replace it with the image "
                "itself"
            )
        yield Item(name, member.offset_data, member.offset_data + member.size)


SOURCES = (
    SourceKind("class_folders", open_class_folders, reads="folder", recognizes=is_class_folders),
)
