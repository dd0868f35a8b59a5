"""Which files are meant: by name, glob or folder, and what kind of data a file extension stands for."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from fmjax.data.storage.mapped import PACKED, plain_name
from fmjax.errors import UserError, nearest

ENDINGS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".conll": "conll",
    ".bio": "conll",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".array_record": "array_record",
    ".tar": "tar",
}
SHARD = re.compile(r"-\d+-of-\d+$")  # what TFDS writes behind the ending
MAY_FOLLOW = f"{', '.join(ending for ending in PACKED if not ending.startswith('.t'))} may follow"
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def kind_of(path: Path) -> str | None:
    """Returns the kind that a file's ending stands for, or None."""
    return ENDINGS.get(Path(SHARD.sub("", plain_name(path))).suffix)


def find_files(files: str | Sequence[str], kind: str = "") -> list[Path]:
    """Returns the files that are meant: a path, several joined by commas, a glob, or a folder.

    Of a folder, those with an ending of the kind (of any kind, if none is given), except licences and readmes.
    Raises UserError, naming what is there, if one is missing.
    """
    if isinstance(files, str):
        files = [files] if Path(files).expanduser().exists() else [part.strip() for part in files.split(",") if part.strip()]
    return [path for part in files for path in expand(Path(part).expanduser(), kind)]


def expand(path: Path, kind: str) -> list[Path]:
    """Returns the files of one path, glob or folder. Raises UserError if there are none."""
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in sorted(path.iterdir()) if file.is_file() and is_data(file, kind)]
        if not found:
            endings = ", ".join(ending for ending, name in ENDINGS.items() if kind in ("", name)) or f"what {kind} files end in"
            raise UserError(f"{path}: the folder has no file that ends in {endings} ({MAY_FOLLOW}); name the files")
        return found
    if glob.has_magic(str(path)):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
        if not found:
            raise UserError(f"{path}: no file matches; correct the pattern")
        return found
    if not path.parent.is_dir():
        raise UserError(f"{path}: no such file, nor the folder {path.parent}; correct the path")
    there = sorted(file.name for file in path.parent.iterdir())
    listed = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "") if there else "nothing"
    raise UserError(f"{path}: no such file{nearest(path.name, there)}; the folder has {listed}")


def is_data(file: Path, kind: str) -> bool:
    """Returns whether a file in a folder is one of its data files."""
    known = kind_of(file)
    return known is not None and kind in ("", known) and not file.name.upper().startswith(("LICENSE", "README", "."))


def is_image(name: str) -> bool:
    """Returns whether a file's ending is that of an image."""
    return name.lower().endswith(IMAGE_ENDINGS)
