"""Files as bytes in memory that take none: they are mapped, and packed ones are unpacked once into the cache and mapped there.

Records are read at random, so an unpacked copy is kept rather than an index into the packed file: an index would unpack
about a megabyte for each record and hold 32 kB for each megabyte. The copy is named by the packed file's hash.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import lzma
import mmap
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fmjax.data.records import Record
from fmjax.data.storage import cache
from fmjax.data.stream.tolerance import tolerates
from fmjax.errors import UserError, one_line

BOM = b"\xef\xbb\xbf"
PACKED = {".gz": "gzip", ".tgz": "gzip", ".xz": "xz", ".txz": "xz", ".bz2": "bzip2", ".tbz2": "bzip2", ".zst": "zstd"}
MEGABYTE = 2**20
BLOCK = 2**14  # bytes between two places whose lines' numbers are known


def plain_name(path: Path) -> str:
    """Returns the name that a file has when it is unpacked: "a.txt" of a.txt.gz, "a.tar" of a.tgz."""
    if path.suffix not in PACKED:
        return path.name
    return path.stem + (".tar" if path.suffix.startswith(".t") else "")


def open_packed(path: Path) -> Any:
    """Returns a stream of what a packed file holds."""
    kind = PACKED[path.suffix]
    if kind == "zstd":
        import pyarrow  # here, because few need it

        return pyarrow.input_stream(str(path), compression="zstd")
    return gzip.open(path) if kind == "gzip" else lzma.open(path) if kind == "xz" else bz2.open(path)


def unpacked(path: Path, most: int | None = None) -> Path:
    """Returns the file whose bytes a file holds: itself, or what it unpacks to, in the cache.

    Raises UserError if it is not whole, unpacks to more than `most` bytes or the cache cannot hold it, OSError if it cannot be
    read.
    """
    if path.suffix not in PACKED:
        return path

    def unpack(stream: BinaryIO) -> None:
        with open_packed(path) as packed:
            while block := read_packed(path, packed):
                stream.write(block)
                if most is not None and stream.tell() > most:
                    raise UserError(f"{path}: unpacks to more than {most:,} bytes; if you trust it, unpack it yourself")

    return cache.made(Path("unpacked", cache.digest(path)["sha256"][:32], plain_name(path)), unpack)


def read_packed(path: Path, packed: Any) -> bytes:
    """Returns the next bytes of a packed file. Raises UserError if it is damaged or cut off."""
    try:
        return bytes(packed.read(MEGABYTE))
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: is not a whole {PACKED[path.suffix]} file ({one_line(error)}); fetch it again") from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read as {PACKED[path.suffix]} ({one_line(error)}); fetch it again, or correct its ending"
        ) from error


class File:
    """The bytes of a file, pickled by its path. Raises UserError if it cannot be read."""

    def __init__(self, path: Path, local: Path | None = None, most: int | None = None):
        """`local` is where the bytes lie, where that is known; `most` is how many a packed file may hold."""
        self.path = path
        try:
            self.local = local or unpacked(path, most)
            with self.local.open("rb") as stream:
                # An empty file cannot be mapped.
                empty = not self.local.stat().st_size
                self.data: bytes | mmap.mmap = b"" if empty else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}); correct the file") from error

    def __reduce__(self) -> tuple[type[File], tuple[Path, Path]]:
        return File, (self.path, self.local)

    @functools.cached_property
    def fingerprint(self) -> Record:
        return {"name": self.path.name} | cache.digest(self.path)

    @functools.cached_property
    def breaks(self) -> np.ndarray:
        """[blocks + 1]: how many line breaks there are before each block of the file."""
        counts = [self.data[begin : begin + BLOCK].count(b"\n") for begin in range(0, len(self.data), BLOCK)]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def line_at(self, place: int) -> int:
        """Returns the number, from 1, of the line that a byte stands in. Tasks ask for every record."""
        block = place // BLOCK
        return 1 + int(self.breaks[block]) + self.data[block * BLOCK : place].count(b"\n")


class Line(NamedTuple):
    """A line of a file: its offsets, its number from 1, and its text with the line break."""

    begin: int
    end: int
    number: int
    text: str


def not_utf8(error: UnicodeDecodeError) -> str:
    """Returns what is wrong with a text, and how to mend it."""
    return f"is not UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file, for example with iconv -t UTF-8"


def lines(file: File, after: Line | None = None) -> Iterator[Line]:
    """Yields the lines of a file, or those after one. Raises UserError, naming the line, if one is not UTF-8; where bad records
    may be left out, its text is then an approximation, and its record cannot be read."""
    begin, number = (after.end, after.number) if after else (len(BOM) if file.data[: len(BOM)] == BOM else 0, 0)
    while begin < len(file.data):
        number += 1
        end = file.data.find(b"\n", begin) + 1 or len(file.data)
        try:
            text = file.data[begin:end].decode("utf-8")
        except UnicodeDecodeError as error:
            if not tolerates():
                raise UserError(f"{file.path} line {number}: {not_utf8(error)}") from error
            text = file.data[begin:end].decode("utf-8", "replace")
        yield Line(begin, end, number, text)
        begin = end
