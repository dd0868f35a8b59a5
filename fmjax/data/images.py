"""Labelled images: MNIST's idx files, class folders, archives of class folders, and the digits that scikit-learn ships.

A record is `{"image": uint8 [H,W,C], "label": int or str}`. Images are decoded once, when a source is opened, and kept in
memory. Nothing of an archive is written anywhere.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from fmjax.data.pixels import decode
from fmjax.data.records import Record, scrambled
from fmjax.errors import UserError, nearest

KINDS = ("idx", "class_folders", "digits")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
ARCHIVE_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
IDX_IMAGES = re.compile(r"images[-.]idx3")
MOST_BYTES = 8 * 2**30  # of decoded images, and of what an archive unpacks to
MOST_FILE = 256 * 2**20  # of one file in an archive
DIGITS = {"train": 1297, "validation": 200, "test": 300}


class Item(NamedTuple):
    """An image file: its name in the archive or folder, and its bytes."""

    name: PurePosixPath
    data: bytes


class Member(tarfile.TarInfo):
    """A member of an archive. A head that is damaged or cut off is an error, where tarfile takes it for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Member:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


class Images:
    """Images and labels in memory. `names` says where each came from, `mark` is the fingerprint."""

    columns = ("image", "label")

    def __init__(
        self, images: Sequence[np.ndarray] | np.ndarray, labels: Sequence[Any], names: Sequence[str] | str, mark: Record
    ):
        self.images, self.labels, self.names, self.mark = images, labels, names, mark

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        return {"image": self.images[index], "label": self.labels[index]}

    def where(self, index: int) -> str:
        return f"{self.names} image {index}" if isinstance(self.names, str) else self.names[index]

    def fingerprint(self) -> Record:
        return self.mark


def kind_of_images(files: str | Sequence[str]) -> str | None:
    """Returns the kind of image source that files, a folder or an archive are, by their names, or None."""
    first = Path(files if isinstance(files, str) else next(iter(files), "")).expanduser()
    if first.name.lower().endswith(ARCHIVE_ENDINGS):
        return "class_folders"
    if IDX_IMAGES.search(first.name):
        return "idx"
    if first.is_dir():
        if any(IDX_IMAGES.search(path.name) for path in first.iterdir()):
            return "idx"
        inside = (path for folder in sorted(first.iterdir()) if folder.is_dir() for path in folder.iterdir())
        return "class_folders" if any(is_image(path.name) for path in inside) else None
    return None


def open_images(kind: str, files: str | Sequence[str] | None, split: str) -> Images:
    """Returns the images of a split. Raises UserError, naming the file or its member, for whatever cannot be read."""
    if kind == "digits":
        return digits(split)
    names = [files] if isinstance(files, str) else list(files or ())
    if len(names) != 1:
        raise UserError(f"data.files.{split}: is {len(names)} names; data.source={kind} reads one file or folder")
    path = Path(names[0]).expanduser()
    if not path.exists():
        there = sorted(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else []
        listed = f"; the folder has {', '.join(there[:8])}" if there else ""
        raise UserError(f"{path}: no such file or folder{nearest(path.name, there)}{listed}; correct the path")
    return open_idx(path, split) if kind == "idx" else open_classes(path, split)


def open_idx(path: Path, split: str) -> Images:
    """Returns the images of an idx file and the labels in the file beside it; of a folder, those that are named like the
    split, or like t10k if that is not train."""
    if path.is_dir():
        begins = "train" if split == "train" else ("t10k", "test")
        found = sorted(file for file in path.iterdir() if IDX_IMAGES.search(file.name) and file.name.startswith(begins))
        if not found:
            raise UserError(f"{path}: has no idx file of images for {split}; give --config.data.files.{split}=FILE")
        path = found[0]
    images = read_idx(path, 3)
    labels_path = beside(path)
    labels = read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise UserError(f"{labels_path}: has {len(labels)} labels for the {len(images)} images of {path.name}; fetch both again")
    if not len(images):
        raise UserError(f"{path}: no images for {split}; give a file that is not empty")
    mark = {"source": "idx", "split": split, "files": [file_mark(path), file_mark(labels_path)]}
    return Images(images[:, :, :, None], labels.tolist(), path.name, mark)


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


def read_idx(path: Path, axes: int) -> np.ndarray:
    """Returns the array of an idx file of bytes with that many axes, gzipped or not.

    Raises UserError if the file does not begin as such a file does, or is longer or shorter than its head says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            head = stream.read(4 + 4 * axes)
            if len(head) < 4 + 4 * axes or head[:4] != bytes([0, 0, 8, axes]):
                raise UserError(
                    f"{path}: begins with {head[:4].hex(' ') or 'nothing'}, not 00 00 08 0{axes} as an idx file of "
                    f"{'images' if axes == 3 else 'labels'} does; name the right file, or fetch it again"
                )
            shape = tuple(int(size) for size in np.frombuffer(head[4:], ">u4"))
            count = int(np.prod(shape, dtype=object))
            if count > MOST_BYTES:
                raise UserError(f"{path}: its head says {shape}, more than {MOST_BYTES:,} bytes; fetch it again")
            data = stream.read(count + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read whole ({error}); fetch it again") from None
    if len(data) != count:
        more = "more" if len(data) > count else f"{len(data):,}"
        raise UserError(f"{path}: its head says {count:,} bytes and it has {more}; fetch it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def open_classes(path: Path, split: str) -> Images:
    """Returns the images of a folder or tar archive of class folders, whose names are the labels.

    Raises UserError, naming the member, for one that is damaged, lies in no folder or outside the archive, or is a link,
    for class folders of several splits, and for more than fits in memory.
    """
    images, labels, names, size = [], [], [], 0
    outer: dict[PurePosixPath, str] = {}
    digest = hashlib.sha256()
    items = folder_items(path) if path.is_dir() else archive_items(path)
    for name, data in items:
        where = f"{path.name}: {name}"
        if len(name.parts) < 2:
            raise UserError(f"{where}: lies in no class folder, so it has no label; put it into one")
        image = decode(data, where)
        size += image.nbytes
        if size > MOST_BYTES:
            raise UserError(
                f"{where}: the images up to here fill {MOST_BYTES:,} bytes; scale them down, or prepare them for TFDS"
            )
        outer.setdefault(name.parent.parent, where)
        if len(outer) > 1:
            others = " and ".join(f"{folder}/" for folder in outer)
            raise UserError(f"{where}: class folders lie in {others}; make one folder or archive for each split")
        if path.is_dir():
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
        images.append(image)
        labels.append(name.parent.name)
        names.append(where)
    if not images:
        raise UserError(f"{path}: no images for {split} ({', '.join(IMAGE_ENDINGS[:4])}, ...); give class folders that have some")
    files = [{"name": path.name, "size": len(images), "sha256": digest.hexdigest()} if path.is_dir() else file_mark(path)]
    return Images(images, labels, names, {"source": "class_folders", "split": split, "files": files})


def folder_items(path: Path) -> Iterator[Item]:
    """Yields the images under a folder, in the order of their names. Raises UserError, naming it, for one that cannot be read."""
    for file in sorted(path.rglob("*")):
        name = PurePosixPath(file.relative_to(path).as_posix())
        if not is_image(file.name) or hidden(name) or file.is_dir():
            continue
        try:
            yield Item(name, file.read_bytes())
        except OSError as error:
            raise UserError(f"{path.name}: {name}: cannot be read ({error.strerror}); mend it, or take it out") from None


def archive_items(path: Path) -> Iterator[Item]:
    """Yields the images of a tar archive, in its order. Raises UserError, naming the member, for what does not belong there."""
    size = 0
    try:
        with tarfile.open(path, "r|*", tarinfo=Member) as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                where = f"{path.name}: {member.name}"
                if name.is_absolute() or ".." in name.parts:
                    raise UserError(f"{where}: would lie outside the archive; do not trust it, get another")
                size += member.size
                if member.size > MOST_FILE or size > MOST_BYTES:
                    raise UserError(
                        f"{where}: unpacks to more than {MOST_FILE:,} bytes, or all to more than {MOST_BYTES:,}; split it"
                    )
                if not is_image(name.name) or hidden(name):
                    continue
                file = archive.extractfile(member) if member.isreg() else None
                if file is None:
                    raise UserError(f"{where}: is a link or a device, not a file; put the image itself there")
                yield Item(name, file.read())
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: is not a whole tar archive ({error}); fetch it again") from None


def is_image(name: str) -> bool:
    """Returns whether a file's ending is that of an image."""
    return name.lower().endswith(IMAGE_ENDINGS)


def hidden(name: PurePosixPath) -> bool:
    """Returns whether a file is one that an operating system left behind."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.parts)


def file_mark(path: Path) -> Record:
    """Returns what tells a file from others: its name, size and hash."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"name": path.name, "size": path.stat().st_size, "sha256": digest}


def digits(split: str) -> Images:
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
    return Images(images[chosen], labels[chosen].tolist(), f"digits {split}", mark)


@functools.cache
def all_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, uint8 [N,8,8,1], and labels [N] of scikit-learn's digits, whose grey runs from 0 to 16."""
    from sklearn.datasets import load_digits  # here, because it takes a moment

    found = load_digits()
    return np.rint(found.images[:, :, :, None] * (255 / 16)).astype(np.uint8), found.target
