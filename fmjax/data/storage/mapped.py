"""Memory-mapped files; compressed ones are decompressed once into the cache.

Records are read at random, so the cache keeps a decompressed copy, not an index into the compressed
file: with an index, reading a record would decompress about a megabyte, and the index would take 32
kB per megabyte. The hash of the compressed file names the copy.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import lzma
import mmap
import os
import resource
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, Self

import numpy as np

from fmjax.contracts import Record, Value
from fmjax.data.storage import cache
from fmjax.data.storage.index import Index, Scan, check_state, index_of
from fmjax.data.stream.tolerance import tolerates
from fmjax.errors import RecordError, UserError, one_line

BOM = b"\xef\xbb\xbf"
COMPRESSIONS = {
    ".gz": "gzip",
    ".tgz": "gzip",
    ".xz": "xz",
    ".txz": "xz",
    ".bz2": "bzip2",
    ".tbz2": "bzip2",
    ".zst": "zstd",
}
MEGABYTE = 2**20
BLOCK = 2**14  # bytes between positions with known line numbers
DESCRIPTORS = 3  # per mapped file: its own, and those of two indexes
HELD = 64 * MEGABYTE  # bytes that are read before the pages of a mapped file are given back


class Readable(Protocol):
    """A stream of bytes that a `with` statement closes."""

    def read(self, size: int, /) -> bytes: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> object: ...


def plain_name(path: Path) -> str:
    """Returns the name of a file after decompression:

    "a.txt" for a.txt.gz, "a.tar" for a.tgz.
    """
    if not compression(path):
        return path.name
    return path.stem + (".tar" if path.suffix.lower().startswith(".t") else "")


def compression(path: Path) -> str:
    """Returns how a file is compressed, by its extension in any case; "" if it is not."""
    return COMPRESSIONS.get(path.suffix.lower(), "")


def open_compressed(path: Path) -> Readable:
    """Returns a stream of the decompressed content of a file."""
    kind = compression(path)
    if kind == "zstd":
        import pyarrow  # imported here because few files need it

        stream: Readable = pyarrow.input_stream(str(path), compression="zstd")
        return stream
    return (
        gzip.open(path) if kind == "gzip" else lzma.open(path) if kind == "xz" else bz2.open(path)
    )


def decompressed(path: Path, most: int | None = None) -> Path:
    """Returns the file itself, or its decompressed copy in the cache if it is compressed.

    Raises UserError if it is damaged, decompresses to more than `most` bytes or does not fit into
    the cache, and OSError if it cannot be read.
    """
    if not compression(path):
        return path

    def write(stream: BinaryIO) -> None:
        with open_compressed(path) as compressed:
            while block := read_compressed(path, compressed):
                stream.write(block)
                if most is not None and stream.tell() > most:
                    raise UserError(
                        f"{path}: decompresses to more than {most:,} bytes; "
                        "if you trust it, decompress it yourself"
                    )

    return cache.get_or_make(
        Path("unpacked", cache.digest(path)["sha256"][:32], plain_name(path)), write
    )


def read_compressed(path: Path, compressed: Readable) -> bytes:
    """Returns the next bytes of a compressed file. Raises UserError if it is damaged or
    truncated."""
    try:
        return bytes(compressed.read(MEGABYTE))
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(
            f"{path}: is not a complete {compression(path)} file ({one_line(error)}); fetch it "
            "again"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read as {compression(path)} ({one_line(error)}); "
            "fetch it again, or correct its file extension"
        ) from error


class File:
    """The bytes of a file, pickled by its path. Raises UserError if it cannot be read."""

    def __init__(self, path: Path, local: Path | None = None, most: int | None = None):
        """
        Args:
          path: the file that the user named.
          local: the decompressed file, if known.
          most: the maximum size after decompression, in bytes.
        """
        self.path = path
        self._read = 0  # bytes since pages were given back
        try:
            self.local = local or decompressed(path, most)
            with self.local.open("rb") as stream:
                self.state = cache.state_in(os.fstat(stream.fileno()))
                empty = not self.state[0]  # and cannot be mapped
                self.data: bytes | mmap.mmap = (
                    b"" if empty else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
                )
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror or error}); correct the file"
            ) from error

    def __reduce__(self) -> tuple[type[File], tuple[Path, Path]]:
        return File, (self.path, self.local)

    @functools.cached_property
    def fingerprint(self) -> Record:
        """The name, size and SHA-256. Raises UserError if another file has taken the name."""
        found = {"name": self.path.name} | cache.digest(self.path)
        check_state(self.local, self.state)
        return found

    def index(self, kind: str, options: Value, width: int, scan: Scan) -> Index:
        """Returns what `scan` finds in the file, which is read only if there is no index
        (`index_of`)."""
        return index_of(self.local, kind, options, width, scan, self.state)

    @functools.cached_property
    def line_break(self) -> bytes:
        """The line break: a line feed, or a carriage return in a file without line feeds (old
        Macs)."""
        cr_alone = self.data.find(b"\n") < 0 <= self.data.find(b"\r")
        return b"\r" if cr_alone else b"\n"

    def read(self, begin: int, end: int) -> bytes:
        """Returns a part of the file.

        Pages that were read count as memory of this process although they are only mapped, so they
        are given back from time to time. The operating system still caches them.
        """
        self._read += end - begin
        if self._read > HELD and isinstance(self.data, mmap.mmap):
            self._read = 0
            self.data.madvise(mmap.MADV_DONTNEED)
        return self.data[begin:end]

    def text(self, begin: int, end: int, errors: str = "strict") -> str:
        """Returns a part of the file as text in which lines end in line feeds.

        Raises UnicodeDecodeError if it is not UTF-8.
        """
        return self.as_text(self.read(begin, end), errors)

    def as_text(self, content: bytes, errors: str = "strict") -> str:
        """Returns a part of the file, which was read, as `text` does."""
        text = content.decode("utf-8", errors)
        return text.replace("\r", "\n") if self.line_break == b"\r" else text

    @functools.cached_property
    def breaks(self) -> np.ndarray:
        """The number of line breaks before each block of the file, [blocks + 1]."""
        return self.index("breaks", BLOCK, 1, self.count_breaks).rows[:, 0]

    def count_breaks(self, facts: Record) -> Iterator[tuple[int]]:
        """Yields the number of line breaks before each block, and that of all."""
        count = 0
        for begin in range(0, len(self.data), BLOCK):
            yield (count,)
            count += self.read(begin, begin + BLOCK).count(self.line_break)
        yield (count,)

    def line_at(self, place: int) -> int:
        """Returns the number, from 1, of the line that a byte belongs to.

        This is fast, since tasks call it for every record.
        """
        block = place // BLOCK
        return 1 + int(self.breaks[block]) + self.data[block * BLOCK : place].count(self.line_break)


def open_files(paths: Sequence[Path]) -> list[File]:
    """Returns mapped files, whose digests are computed several at a time.

    Raises UserError if one cannot be read.
    """
    make_room(DESCRIPTORS * len(paths))
    cache.read_digests(paths)
    return [File(path) for path in paths]


def make_room(count: int) -> None:
    """Lets this process, and those that it starts, open `count` more files, as far as the system
    allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
    if soft not in (resource.RLIM_INFINITY, wanted):
        with contextlib.suppress(OSError, ValueError):  # macOS has a limit below the hard one
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Line(NamedTuple):
    """A line of a file: its offsets, its number from 1, and its text with the line break."""

    begin: int
    end: int
    number: int
    text: str


def not_utf8(error: UnicodeDecodeError) -> str:
    """Returns what is wrong with a text that is not UTF-8, and how to fix it."""
    byte = error.object[error.start]
    return f"is not UTF-8 (byte 0x{byte:02x}); convert the file, for example with iconv -t UTF-8"


def lines(file: File, after: Line | None = None) -> Iterator[Line]:
    """Yields the lines of a file, or those after a given line.

    Raises RecordError for a line that is not UTF-8; if bad records may be skipped, yields it with
    bad bytes replaced, and reading its record fails.
    """
    begin, number = (
        (after.end, after.number) if after else (len(BOM) if file.data[: len(BOM)] == BOM else 0, 0)
    )
    while begin < len(file.data):
        number += 1
        end = file.data.find(file.line_break, begin) + 1 or len(file.data)
        try:
            text = file.text(begin, end)
        except UnicodeDecodeError as error:
            if not tolerates():
                raise RecordError(f"{file.path} line {number}", not_utf8(error)) from error
            text = file.text(begin, end, "replace")
        yield Line(begin, end, number, text)
        begin = end
