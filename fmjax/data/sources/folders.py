"""Labeled images or texts in class folders, or in archives of class folders.

A record is `{"image": uint8 [H,W,C], "label": str}` or `{"text": str, "label": str}`. Texts end in
.txt or .text, or have no extension, as in 20 Newsgroups. If there are images, other files are left
out. Archives are memory-mapped (`mapped.py`),
compressed ones are decompressed once into the cache as a whole; members are not extracted. Their
offsets and labels are in an index, which is memory-mapped, too (`index.py`). Of a folder, memory
holds the names of the images, in one byte string. Up to MOST_KEPT bytes of decoded images are kept,
so that small data sets are decoded once. Other images are decoded on each read, so a damaged one is
found only then.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeAlias

import numpy as np

from fmjax.contracts import Record, Value
from fmjax.data.kinds.pixels import decode
from fmjax.data.records import RecordSource
from fmjax.data.sources.idx import MOST_BYTES, is_idx
from fmjax.data.sources.kinds import (
    BY_NAME,
    NO,
    Files,
    SourceKind,
    extensions,
    first_path,
    one_path,
)
from fmjax.data.storage import cache
from fmjax.data.storage.mapped import File, not_utf8
from fmjax.data.storage.paths import (
    IMAGE_EXTENSIONS,
    TEXT_EXTENSIONS,
    is_image,
    is_text,
    kind_of,
)
from fmjax.data.storage.tar import ARCHIVE_EXTENSIONS, hidden, left_behind, member_at, members
from fmjax.data.stream.tolerance import tolerates
from fmjax.errors import RecordError, UserError

MOST_FILE = 256 * 2**20  # of one file in an archive
MOST_KEPT = 256 * 2**20  # of the decoded images that a source keeps; CIFAR-10 takes 180 MB
Wanted: TypeAlias = Callable[[str], bool]  # whether a file of a name is read
OVERHEAD = 512  # bytes of an array besides its pixels


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


class Labels:
    """Finds the label of an image file, which is the name of its folder; `place` is the folder or
    archive of class folders, for messages."""

    def __init__(self, place: str):
        self.place = place
        self.outer: str | None = None  # the folder of the class folders

    def of(self, name: str) -> str:
        """Returns the label of a file, such as "cat" of "train/cat/1.png".

        Raises UserError if it is in no folder, or in class folders of another split.
        """
        folder = name.rpartition("/")[0]
        if not folder:
            raise UserError(
                f"{self.place}: {name}: is not in a class folder, so it has no label; "
                "move it into one"
            )
        outer, _, label = folder.rpartition("/")
        self.outer = outer if self.outer is None else self.outer
        if outer != self.outer:
            raise UserError(
                f"{self.place}: {name}: class folders lie in {self.outer or '.'}/ and "
                f"{outer or '.'}/; make one folder or archive for each split"
            )
        return label


class Images(Protocol):
    """The image or text files of a folder or an archive."""

    @property
    def mark(self) -> Record:
        """The name, size and digest of the folder or archive."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Returns the name of a file, with its folders."""

    def label(self, index: int) -> str:
        """Returns the label of a file."""

    def read(self, index: int) -> bytes:
        """Returns the bytes of a file. Raises OSError if they cannot be read."""


class ArchiveImages:
    """The wanted files of a tar archive, in its order. The index holds, for each, the number of its
    label, and the offsets of its header, begin and end."""

    def __init__(self, path: Path, wanted: Wanted):
        self.file, self.wanted = File(path, most=MOST_BYTES), wanted
        options = {} if wanted is is_image else {"wanted": wanted.__name__}
        self.index = self.file.index(f"{__name__}.ArchiveImages", options, 4, self.scan)
        self.mark = self.file.fingerprint

    def scan(self, facts: Record) -> Iterator[tuple[int, int, int, int]]:
        """Yields the row of each image, and adds the labels to `facts`."""
        labels, numbers = Labels(self.file.path.name), dict[str, int]()
        for member in wanted_members(self.file, self.wanted):
            label = labels.of(str(PurePosixPath(member.name)))
            begin = member.offset_data
            yield numbers.setdefault(label, len(numbers)), member.offset, begin, begin + member.size
        facts["labels"] = list(numbers)

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        _, head, begin, _ = self.index.rows[index].tolist()
        return str(PurePosixPath(member_at(self.file, head, begin).name))

    def label(self, index: int) -> str:
        label: str = self.index.facts["labels"][int(self.index.rows[index, 0])]
        return label

    def read(self, index: int) -> bytes:
        begin, end = self.index.rows[index, 2:].tolist()
        return self.file.read(begin, end)


class FolderImages:
    """The wanted files under a folder, in the order of their names. Their digest is that of the
    names and sizes, and with `data.verify` also of the contents."""

    def __init__(self, path: Path, wanted: Wanted):
        self.path, self.names = path, Names()
        labels, verify = Labels(path.name), cache.is_verifying()
        of_names, of_contents = hashlib.sha256(), hashlib.sha256()
        for name, size in wanted_files(str(path), "", path.name, wanted):
            labels.of(name)
            self.names.append(name)
            of_names.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
            if verify:
                data = self.checked(len(self.names) - 1)
                head = f"{name}\0{len(data)}\0".encode("utf-8", "surrogateescape")
                of_contents.update(head + data)
        self.mark: Record = {"name": path.name, "size": len(self.names)}
        self.mark |= {"names": of_names.hexdigest()}
        self.mark |= {"sha256": of_contents.hexdigest()} if verify else {}

    def checked(self, index: int) -> bytes:
        """Returns the bytes of a file.

        Raises RecordError if it cannot be read, unless bad records may be skipped.
        """
        try:
            return self.read(index)
        except OSError as error:
            if not tolerates():
                where = f"{self.path.name}: {self.names[index]}"
                raise RecordError(where, unreadable(error), index) from None
            return b""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def label(self, index: int) -> str:
        return self.names[index].rsplit("/", 2)[-2]

    def read(self, index: int) -> bytes:
        return (self.path / self.names[index]).read_bytes()


class ClassFolders(RecordSource):
    """The images, or else the texts, of a folder or tar archive of class folders, whose names are
    the labels; pickled without decoded images.

    Raises UserError, naming the member, that is in no folder or outside the archive, is a link or
    larger than MOST_FILE, and for class folders of several splits. A damaged member is an error
    when it is read.
    """

    def __init__(self, path: Path, split: str):
        self.path = path
        found = FolderImages if path.is_dir() else ArchiveImages
        self.images: Images = found(path, is_image)
        self.holds = "image"
        if not len(self):
            self.images, self.holds = found(path, is_text), "text"
        self.columns = (self.holds, "label")
        self.kept: dict[int, np.ndarray] = {}  # some of the decoded images, by index
        self.room = MOST_KEPT  # remaining bytes for decoded images
        if not len(self):
            endings = ", ".join(IMAGE_EXTENSIONS[:4])
            raise UserError(
                f"{path}: no images for {split} ({endings}, ...) and no texts "
                f"({', '.join(TEXT_EXTENSIONS)}); use class folders that contain some"
            )
        self.mark = {"source": "class_folders", "split": split, "files": [self.images.mark]}

    def __getstate__(self) -> Record:
        return self.__dict__ | {"kept": {}, "room": MOST_KEPT}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        value = self.text(index) if self.holds == "text" else self.image(index)
        return {self.holds: value, "label": self.label(index)}

    def value(self, index: int, name: str) -> Value:
        """Returns one value of a record: the label without decoding the image."""
        index = range(len(self))[index]
        return self.label(index) if name == "label" else self[index][name]

    def label(self, index: int) -> str:
        return self.images.label(index)

    def read(self, index: int) -> bytes:
        """Returns the bytes of a file. Raises RecordError if it cannot be read."""
        try:
            return self.images.read(index)
        except OSError as error:
            raise RecordError(self.where(index), unreadable(error), index) from None

    def text(self, index: int) -> str:
        """Returns a text, with line feeds. Raises RecordError if it is not UTF-8."""
        try:
            text = self.read(index).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecordError(self.where(index), not_utf8(error), index) from error
        return text.replace("\r\n", "\n")

    def image(self, index: int) -> np.ndarray:
        """Returns a decoded image and keeps it while there is room. With shuffled epochs, it does
        not matter which images are kept.

        Raises RecordError if it cannot be read or decoded.
        """
        image = self.kept.get(index)
        if image is None:
            image = decode(self.read(index), self.where(index))
            size = image.nbytes + OVERHEAD
            if size <= self.room:
                self.room -= size
                self.kept[index] = image
        return image

    def where(self, index: int) -> str:
        return f"{self.path.name}: {self.images.name(range(len(self))[index])}"

    def fingerprint(self) -> Record:
        return self.mark


def is_class_folders(files: Files) -> int:
    """Returns the certainty that files are a folder or an archive of class folders."""
    first = first_path(files)
    if first.name.lower().endswith(ARCHIVE_EXTENSIONS):
        return BY_NAME
    if not first.is_dir() or is_idx(files):
        return NO
    there = sorted(path for path in first.iterdir() if not left_behind(path.name))
    texts = not any(path.is_file() and kind_of(path, extensions()) for path in there)
    inside = (name for folder in there if folder.is_dir() for name in names_in(folder))
    found = any(is_image(name) or (texts and is_text(name)) for name in inside)
    return BY_NAME if found else NO


def names_in(folder: Path) -> Iterator[str]:
    """Yields the names in a folder, one after the other, except those that are left out."""
    with os.scandir(folder) as entries:
        yield from (entry.name for entry in entries if not left_behind(entry.name))


def open_class_folders(files: Files, split: str) -> ClassFolders:
    """Returns the images of a folder or an archive of class folders.

    Raises UserError if they cannot be read.
    """
    return ClassFolders(one_path(files, split, "class_folders"), split)


def unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror or error}); fix it, or remove it"


def wanted_files(folder: str, inner: str, place: str, wanted: Wanted) -> Iterator[tuple[str, int]]:
    """Yields the names, below the outermost folder, and sizes of the wanted files in a folder and
    its subfolders, in the order of their names. Memory holds the names of one folder at a time.

    Links to folders are not followed. Raises UserError for a folder that cannot be read, and
    RecordError for such a file; if bad records may be skipped, yields it with size 0.
    """
    listed = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if left_behind(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    listed.append((entry.name, -1))
                elif wanted(entry.name) and not entry.is_dir():
                    listed.append((entry.name, size_of(entry, f"{place}: {inner}{entry.name}")))
    except OSError as error:
        where = f"{place}: {inner[:-1]}" if inner else place
        raise UserError(f"{where}: {unreadable(error)}") from None
    for name, size in sorted(listed):
        if size < 0:
            yield from wanted_files(f"{folder}/{name}", f"{inner}{name}/", place, wanted)
        else:
            yield inner + name, size


def size_of(entry: os.DirEntry[str], where: str) -> int:
    """Returns the size of an image file in bytes.

    Raises RecordError if it cannot be read; 0 if bad records may be skipped.
    """
    try:
        return entry.stat().st_size
    except OSError as error:
        if not tolerates():
            raise RecordError(where, unreadable(error)) from None
        return 0


def wanted_members(file: File, wanted: Wanted) -> Iterator[tarfile.TarInfo]:
    """Yields the wanted files of a tar archive, in its order.

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
        if not wanted(name.name) or hidden(name) or member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise UserError(
                f"{where}: is a link, a device or sparse, not a file; replace it with the file "
                "itself"
            )
        yield member


SOURCES = (
    SourceKind("class_folders", open_class_folders, reads="folder", recognizes=is_class_folders),
)
