"""Labeled images: MNIST's idx files, class folders, archives of class folders, and the digits that scikit-learn ships.

A record is `{"image": uint8 [H,W,C], "label": int or str}`. Files and archives are memory-mapped (`mapped.py`), compressed ones
decompressed once into the cache as a whole; no member of an archive becomes a file. In memory are each image's name, in an
archive also its offsets (16 bytes), and up to MOST_KEPT bytes of the images that were decoded first, so that small data sets are
decoded once. Other images are decoded each time they are read, so a damaged one is found only then.
"""

from __future__ import annotations

import functools
import hashlib
import lzma
import os
import re
import tarfile
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from fmjax.contracts import Record, Value
from fmjax.data.kinds.pixels import decode
from fmjax.data.records import RecordSource, scrambled
from fmjax.data.sources.kinds import BY_NAME, NO, Files, SourceKind
from fmjax.data.storage.mapped import MEGABYTE, File
from fmjax.data.storage.paths import IMAGE_EXTENSIONS, is_image
from fmjax.data.stream.tolerance import tolerates
from fmjax.errors import RecordError, UserError, nearest, one_line

ARCHIVE_EXTENSIONS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
IDX_IMAGES = re.compile(r"images[-.]idx3")
MOST_BYTES = 8 * 2**30  # of a decompressed file
MOST_FILE = 256 * 2**20  # of one file in an archive
MOST_KEPT = 256 * 2**20  # of the decoded images that a source keeps; CIFAR-10 takes 180 MB
OVERHEAD = 512  # bytes of an array besides its pixels
DIGITS = {"train": 1297, "validation": 200, "test": 300}
BROKEN = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
MAGIC = {b"\x1f\x8b": ".gz", b"\xfd7zXZ": ".xz", b"BZh": ".bz2", b"\x28\xb5\x2f\xfd": ".zst"}  # first bytes of compressed files


class Item(NamedTuple):
    """An image file: its name in the archive or folder, its offsets in the archive, its bytes if it is in a folder."""

    name: PurePosixPath
    begin: int = 0
    end: int = 0
    data: bytes = b""


class Member(tarfile.TarInfo):
    """A member of an archive. A header that is damaged or cut off is an error; tarfile takes it for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Member:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


class Names:
    """A list of texts in one string of bytes, and 8 bytes for each."""

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


class Images(RecordSource):
    """Images, uint8 [N,H,W,C], and labels, [N]. `name` says where they are from, `mark` is the fingerprint."""

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
    """The images of an idx file and the labels of another, both memory-mapped and pickled by their paths.

    Raises UserError if one is no such file or cut off, if they differ in length, and if they are empty.
    """

    def __init__(self, images: File, labels: File, split: str, mark: Record | None = None):
        """`mark` is the fingerprint, if that is known."""
        pixels, numbers = idx_array(images, 3), idx_array(labels, 1)
        if len(pixels) != len(numbers):
            raise UserError(
                f"{labels.path}: has {len(numbers)} labels for the {len(pixels)} images of {images.path.name}; fetch both again"
            )
        if not len(pixels):
            raise UserError(f"{images.path}: no images for {split}; give a file that is not empty")
        self.files, self.split = (images, labels), split
        mark = mark or {"source": "idx", "split": split, "files": [file.fingerprint for file in self.files]}
        super().__init__(pixels[:, :, :, None], numbers, images.path.name, mark)

    def __reduce__(self) -> tuple[type[Idx], tuple[File, File, str, Record]]:
        return Idx, (*self.files, self.split, self.mark)


class ClassFolders(RecordSource):
    """The images of a folder or tar archive of class folders, whose names are the labels; pickled without decoded images.

    Raises UserError, naming the member, for one that lies in no folder or outside the archive, is a link or larger than
    MOST_FILE, and for class folders of several splits; when it is read, for one that is damaged.
    """

    columns = ("image", "label")

    def __init__(self, path: Path, split: str):
        self.path, self.names, self.spans = path, Names(), array("q")
        self.file = None if path.is_dir() else File(path, most=MOST_BYTES)
        self.kept: dict[int, np.ndarray] = {}  # some of the images, by their numbers
        self.room = MOST_KEPT  # bytes that may still be kept
        outer: dict[PurePosixPath, str] = {}
        digest = hashlib.sha256()
        for name, begin, end, data in archive_items(self.file) if self.file else folder_items(path):
            where = f"{path.name}: {name}"
            if len(name.parts) < 2:
                raise UserError(f"{where}: lies in no class folder, so it has no label; put it into one")
            outer.setdefault(name.parent.parent, where)
            if len(outer) > 1:
                others = " and ".join(f"{folder}/" for folder in outer)
                raise UserError(f"{where}: class folders lie in {others}; make one folder or archive for each split")
            self.names.append(str(name))
            if self.file:
                self.spans.extend((begin, end))
            else:
                digest.update(f"{name}\0{len(data)}\0".encode() + data)
        if not len(self):
            endings = ", ".join(IMAGE_EXTENSIONS[:4])
            raise UserError(f"{path}: no images for {split} ({endings}, ...); give class folders that have some")
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
        """Returns a decoded image and keeps it while there is room: in shuffled epochs any choice of images is as good.

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


def is_idx(files: Files) -> int:
    """Returns how sure it is that files are idx files, or a folder of such."""
    first = first_of(files)
    if first.name.lower().endswith(ARCHIVE_EXTENSIONS):
        return NO
    inside = first.iterdir() if first.is_dir() else ()
    return BY_NAME if any(IDX_IMAGES.search(path.name) for path in (first, *inside)) else NO


def is_class_folders(files: Files) -> int:
    """Returns how sure it is that files are a folder of class folders, or an archive of them."""
    first = first_of(files)
    if first.name.lower().endswith(ARCHIVE_EXTENSIONS):
        return BY_NAME
    if not first.is_dir() or is_idx(files):
        return NO
    inside = (path for folder in sorted(first.iterdir()) if folder.is_dir() for path in folder.iterdir())
    return BY_NAME if any(is_image(path.name) for path in inside) else NO


def first_of(files: Files) -> Path:
    return Path(files if isinstance(files, str) else next(iter(files), "")).expanduser()


def one_path(files: Files, split: str, kind: str) -> Path:
    """Returns the one file or folder that is named. Raises UserError if it does not exist, or several are named."""
    names = [files] if isinstance(files, str) else list(files)
    if len(names) != 1:
        raise UserError(f"data.files.{split}: is {len(names)} names; data.source={kind} reads one file or folder")
    path = Path(names[0]).expanduser()
    if not path.exists():
        there = sorted(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else []
        listed = f"; the folder has {', '.join(there[:8])}" if there else ""
        raise UserError(f"{path}: no such file or folder{nearest(path.name, there)}{listed}; correct the path")
    return path


def open_class_folders(files: Files, split: str) -> ClassFolders:
    """Returns the images of a folder or an archive of class folders. Raises UserError if they cannot be read."""
    return ClassFolders(one_path(files, split, "class_folders"), split)


def open_idx(files: Files, split: str) -> Idx:
    """Returns the images of an idx file and the labels in the file next to it; of a folder, those with the name of the split,
    or t10k if that is not train. Raises UserError if they cannot be read."""
    path = one_path(files, split, "idx")
    if path.is_dir():
        begins = "train" if split == "train" else ("t10k", "test")
        found = sorted(file for file in path.iterdir() if IDX_IMAGES.search(file.name) and file.name.startswith(begins))
        if not found:
            raise UserError(f"{path}: has no idx file of images for {split}; give --config.data.files.{split}=FILE")
        path = found[0]
    return Idx(File(path, most=MOST_BYTES), File(beside(path), most=MOST_BYTES), split)


def beside(path: Path) -> Path:
    """Returns the file of labels that goes with an idx file of images. Raises UserError if it is not there."""
    if not IDX_IMAGES.search(path.name):
        raise UserError(f"{path}: is not named like an idx file of images, as train-images-idx3-ubyte.gz; name that file")
    plain = path.name.removesuffix(".gz")
    tried = [IDX_IMAGES.sub(f"labels{mark}idx1", plain) + packed for mark in "-." for packed in (".gz", "")]
    for name in tried:
        if (path.parent / name).is_file():
            return path.parent / name
    raise UserError(f"{path}: the file of its labels, {tried[0]} or {tried[1]}, is not beside it; put it there")


def idx_array(file: File, axes: int) -> np.ndarray:
    """Returns the array of an idx file of bytes with that many axes, a view of the mapped file.

    Raises UserError if the file does not begin as such a file does, or is longer or shorter than its head says.
    """
    begin = 4 + 4 * axes
    head = file.data[:begin]
    if len(head) < begin or head[:4] != bytes([0, 0, 8, axes]):
        raise UserError(
            f"{file.path}: begins with {head[:4].hex(' ') or 'nothing'}, not 00 00 08 0{axes} as an idx file of "
            f"{'images' if axes == 3 else 'labels'} does; name the right file, or fetch it again"
        )
    shape = tuple(int(size) for size in np.frombuffer(head[4:], ">u4"))
    count, found = int(np.prod(shape, dtype=object)), len(file.data) - begin
    if found != count:
        raise UserError(f"{file.path}: its head says {count:,} bytes and it has {found:,}; fetch it again")
    return np.frombuffer(file.data, np.uint8, offset=begin).reshape(shape)


def unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror or error}); fix it, or take it out"


def folder_items(path: Path) -> Iterator[Item]:
    """Yields the images under a folder, in the order of their names.

    Raises RecordError for one that cannot be read; if bad records may be left out, yields it without bytes.
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
    """Yields the files in a folder and in the folders in it, in the order of their names, which are held of one folder at a time.

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
    """Yields the images of a tar archive, in its order. Raises UserError, naming the member, for what does not belong there."""
    for member in members(file):
        name = PurePosixPath(member.name)
        where = f"{file.path.name}: {member.name}"
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{where}: would lie outside the archive; do not trust it, get another")
        if member.size > MOST_FILE:
            raise UserError(f"{where}: takes more than {MOST_FILE:,} bytes; take it out")
        if not is_image(name.name) or hidden(name) or member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise UserError(f"{where}: is a link or a device, or sparse, not a file; put the image itself there")
        yield Item(name, member.offset_data, member.offset_data + member.size)


def members(file: File) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a mapped tar archive, in its order. Raises UserError if it is damaged."""
    end = 0
    try:
        with tarfile.open(file.local, "r:", tarinfo=Member) as archive:
            while member := archive.next():
                archive.members.clear()  # type: ignore[attr-defined]  # they would grow with the archive
                end = archive.offset
                yield member
    except BROKEN as error:
        extension = next((extension for magic, extension in MAGIC.items() if file.data[: len(magic)] == magic), "")
        fix = f"it seems to be packed, and its name to lack {extension}" if extension else "fetch it again"
        raise UserError(f"{file.path}: is not a whole tar archive ({one_line(error)}); {fix}") from error
    # Python takes the first block of zeros for the end of the archive.
    for begin in range(end, len(file.data), MEGABYTE):
        if file.data[begin : begin + MEGABYTE].strip(b"\0"):
            raise UserError(f"{file.path}: has more behind its end; were archives put into one file? Give them as several")


def hidden(name: PurePosixPath) -> bool:
    """Returns whether an operating system left a file behind."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.parts)


def open_digits(files: None, split: str) -> Images:
    """Returns a split of scikit-learn's 1,797 handwritten digits of 8 x 8 pixels (the test set of UCI's optdigits).

    Raises UserError for an unknown split.
    """
    if split not in DIGITS:
        raise UserError(f'digits has no split "{split}"{nearest(split, DIGITS)}; choose one of {", ".join(DIGITS)}')
    images, labels = all_digits()
    ends = np.cumsum(list(DIGITS.values()))
    begin = int(ends[list(DIGITS).index(split)]) - DIGITS[split]
    chosen = np.sort(np.argsort(scrambled(len(images)), kind="stable")[begin : begin + DIGITS[split]])
    mark = {"source": "digits", "split": split, "sha256": hashlib.sha256(images[chosen].tobytes()).hexdigest()}
    return Images(images[chosen], labels[chosen], f"digits {split}", mark)


@functools.cache
def all_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, uint8 [N,8,8,1], and labels [N] of scikit-learn's digits, whose grey runs from 0 to 16."""
    from sklearn.datasets import load_digits  # imported here because it takes a moment

    found = load_digits()
    return np.rint(found.images[:, :, :, None] * (255 / 16)).astype(np.uint8), found.target


SOURCES = (
    SourceKind("class_folders", open_class_folders, reads="folder", recognizes=is_class_folders),
    SourceKind("idx", open_idx, reads="folder", recognizes=is_idx),
    SourceKind("digits", open_digits, reads="nothing"),
)
