"""Members of memory-mapped tar archives."""

from __future__ import annotations

import io
import lzma
import tarfile
import zlib
from array import array
from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np

from fmjax.data.storage.mapped import MEGABYTE, File
from fmjax.errors import UserError, one_line

ARCHIVE_EXTENSIONS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
BROKEN = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
# The first bytes of compressed files.
MAGIC = {b"\x1f\x8b": ".gz", b"\xfd7zXZ": ".xz", b"BZh": ".bz2", b"\x28\xb5\x2f\xfd": ".zst"}


class Member(tarfile.TarInfo):
    """A member of an archive.

    A damaged or truncated header is an error; tarfile would treat it as the end of the archive.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Member:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def members(file: File) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a mapped tar archive, in its order.

    Raises UserError if it is damaged, or has two files with the same name.
    """
    # Hashes of the names, since the names themselves would grow with the archive.
    end, seen = 0, array("q")
    try:
        with tarfile.open(file.local, "r:", tarinfo=Member) as archive:
            while member := archive.next():
                # They would grow with the archive.
                archive.members.clear()  # type: ignore[attr-defined]
                end = archive.offset
                if member.isreg():
                    seen.append(hash(member.name))
                yield member
    except BROKEN as error:
        extension = next(
            (extension for magic, extension in MAGIC.items() if file.data[: len(magic)] == magic),
            "",
        )
        fix = (
            f"it seems to be compressed; add {extension} to its name"
            if extension
            else "fetch it again"
        )
        raise UserError(
            f"{file.path}: is not a complete tar archive ({one_line(error)}); {fix}"
        ) from error
    check_names(file, np.frombuffer(seen, np.int64))
    # Python treats the first block of zeros as the end of the archive.
    for begin in range(end, len(file.data), MEGABYTE):
        if file.data[begin : begin + MEGABYTE].strip(b"\0"):
            raise UserError(
                f"{file.path}: has data after its end; "
                "if archives were concatenated, give them as separate files"
            )


def check_names(file: File, hashes: np.ndarray) -> None:
    """Raises UserError if an archive has two files with the same name.

    `hashes` [files] are those of the names; names are read again only if two hashes are equal.
    """
    values, counts = np.unique(hashes, return_counts=True)
    doubtful = set(values[counts > 1].tolist())
    seen = set[str]()
    if doubtful:
        with tarfile.open(file.local, "r:", tarinfo=Member) as archive:
            while member := archive.next():
                archive.members.clear()  # type: ignore[attr-defined]
                if not member.isreg() or hash(member.name) not in doubtful:
                    continue
                if member.name in seen:
                    raise UserError(f'{file.path}: has two files named "{member.name}"; remove one')
                seen.add(member.name)


def member_at(file: File, head: int, begin: int) -> tarfile.TarInfo:
    """Returns the member of an archive whose header begins at `head`, and its content at
    `begin`."""
    with tarfile.open(fileobj=io.BytesIO(file.data[head:begin]), mode="r:") as archive:
        member = archive.next()
    assert member
    return member


def hidden(name: PurePosixPath) -> bool:
    """Returns whether a file was left behind by an operating system, or is in such a folder."""
    return any(map(left_behind, name.parts))


def left_behind(name: str) -> bool:
    """Returns whether an operating system left a file or folder of this name behind."""
    return name.startswith(".") or name == "__MACOSX"
