"""Records of ArrayRecord files that are read by range.

An ArrayRecord file is a file of Riegeli records (github.com/google/riegeli, "Riegeli/records file
format"): chunks of records, in blocks of 64 KiB, each with a header, which may lie inside of a
chunk. The last block has the place of the footer, a chunk with the place and the number of records
of every chunk. So a record takes one request, once the footer is known.

Numbers are little-endian. A chunk's header has its hash, the size and the hash of its data, its
type and number of records, and the decoded size. The data of a simple chunk are the compression,
then the sizes of its records (varints, compressed) and the records. Hashes are not checked: stores
check what they keep, and TLS what arrives.
"""

from __future__ import annotations

import struct

import numpy as np
import pyarrow as pa

from fmjax.data.storage.ranged import Ahead, CannotRange, RangedFile
from fmjax.errors import UserError, one_line

BLOCK, BLOCK_HEADER, CHUNK_HEADER = 2**16, 24, 40
TAIL = 2**18  # bytes at the end of a file, which often have the whole footer
KIND = 24  # the place of a chunk's type in its header
SIMPLE = ord("r")
CODECS = {ord("z"): "zstd", ord("b"): "brotli", ord("s"): "snappy"}
POSTSCRIPT = 0x71930E704FDAE05E  # the second number of the postscript
BROKEN = (ValueError, IndexError, KeyError, struct.error, pa.ArrowException, OSError)


class RangedRecords:
    """The records of a file as bytes, pickled by the file.

    Raises UserError if the file is not a complete ArrayRecord file.
    """

    def __init__(self, file: RangedFile):
        self.file, self.ahead = file, Ahead(file)
        try:
            self.begins, self.ends, self.bounds = chunks_of(file)
        except BROKEN as error:
            raise UserError(
                f"{file}: is not a complete ArrayRecord file ({one_line(error, 200)}); upload it "
                "again"
            ) from error
        self.last: tuple[int, list[bytes]] = (-1, [])  # the number and the records of a chunk

    def __reduce__(self) -> tuple[type[RangedRecords], tuple[RangedFile]]:
        return RangedRecords, (self.file,)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def check(self) -> None:
        """Raises CannotRange if records are transposed, as the head of the first chunk says."""
        if not len(self):
            return
        begin = int(self.begins[0])
        end = min(begin + BLOCK_HEADER + CHUNK_HEADER, self.file.size)
        head = without_headers(self.file.read(begin, end), begin)
        if len(head) > KIND and head[KIND] != SIMPLE:
            raise CannotRange(f"{self.file}: has transposed records; download it")

    def read(self, index: int) -> bytes:
        """Returns a record. Raises ValueError if it is damaged."""
        number = int(np.searchsorted(self.bounds, index, side="right")) - 1
        last, records = self.last  # read once, since other threads may change it
        if last != number:
            begin, end = int(self.begins[number]), int(self.ends[number])
            data = self.ahead.read(begin, end)
            try:
                records = records_of(data, begin)
            except BROKEN as error:
                raise ValueError(one_line(error, 200)) from error
            self.last = number, records
        return records[index - int(self.bounds[number])]


def chunks_of(file: RangedFile) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the begin and the end of each chunk of records [C], and the number of records before
    each [C + 1]."""
    tail = max(file.size - max(TAIL, BLOCK), 0) // BLOCK * BLOCK
    data = file.read(tail, file.size)
    block = (max(file.size, 1) - 1) // BLOCK * BLOCK
    (postscript, *_) = records_of(data[block - tail :], block)
    place, magic = (int(number) for number in varints(postscript)[1::2])
    if magic != POSTSCRIPT:
        raise ValueError("has no postscript")
    if place < tail:
        data = file.read(place, tail) + data
        tail = place
    _, *footers = records_of(data[place - tail :], place)
    numbers = varints(b"".join(footers))
    tags, values = numbers[::2], numbers[1::2]
    begins, counts = values[tags == 1 << 3].astype(np.int64), values[tags == 3 << 3]
    if len(begins) != len(counts) or (np.diff(begins, append=place) <= 0).any():
        raise ValueError("has a damaged footer")
    return begins, np.append(begins[1:], place), np.cumsum([0, *counts.tolist()])


def records_of(data: bytes, begin: int) -> list[bytes]:
    """Returns the records of the chunk with which data begin, at a place of the file.

    Raises ValueError, IndexError, KeyError or an error of Arrow if it is damaged.
    """
    data = without_headers(data, begin)
    size, kind, count = (
        struct.unpack_from("<Q", data, 8)[0],
        data[KIND],
        int.from_bytes(data[25:32], "little"),
    )
    data = data[CHUNK_HEADER : CHUNK_HEADER + size]
    if len(data) < size:
        raise ValueError("is cut off")
    if kind != SIMPLE:
        raise ValueError("has transposed records, which cannot be read by range; download it")
    codec = data[0]
    bytes_of_sizes, at = varint(data, 1)
    sizes = varints(expanded(data[at : at + bytes_of_sizes], codec)).astype(np.int64)
    values = expanded(data[at + bytes_of_sizes :], codec)
    ends = np.cumsum(sizes)
    if len(sizes) != count or (count and ends[-1] != len(values)):
        raise ValueError("has a damaged chunk")
    return [
        values[end - size : end] for size, end in zip(sizes.tolist(), ends.tolist(), strict=True)
    ]


def without_headers(data: bytes, begin: int) -> bytes:
    """Returns data that begin at a place of the file, without the headers of blocks in them."""
    parts, place = [], 0
    while place < len(data):
        inside = (begin + place) % BLOCK
        place += BLOCK_HEADER if inside == 0 else 0
        end = place + BLOCK - max(inside, BLOCK_HEADER)
        parts.append(data[place:end])
        place = end
    return b"".join(parts)


def expanded(data: bytes, codec: int) -> bytes:
    """Returns data that are compressed after a varint of their size; codec 0 stands for none."""
    if not codec:
        return data
    size, at = varint(data, 0)
    if not size:
        return b""
    return bytes(pa.decompress(data[at:], size, CODECS[codec], asbytes=True))


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Returns a number of 7 bits per byte, the lowest first, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("has a damaged number")


def varints(data: bytes) -> np.ndarray:
    """Returns all numbers in data, uint64 [N]."""
    letters = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(letters < 0x80)
    if not ends.size:
        return np.zeros(0, np.uint64)
    letters = letters[: ends[-1] + 1]
    begins = np.concatenate([[0], ends[:-1] + 1])
    places = np.arange(letters.size) - np.repeat(begins, ends - begins + 1)
    parts = (letters & 0x7F).astype(np.uint64) << (7 * places).astype(np.uint64)
    return np.add.reduceat(parts, begins)
