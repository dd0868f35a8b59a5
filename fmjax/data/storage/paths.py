"""Finds files by name, glob or folder. File extensions determine the kind of source.

`extensions` maps known extensions to the name of the kind, such as {".csv": "csv"}; see
`sources/kinds.py`.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fmjax.data.storage.mapped import COMPRESSIONS, plain_name
from fmjax.errors import UserError, nearest

SHARD = re.compile(r"-\d+-of-\d+$")  # suffix that TFDS writes after the file extension
MAY_FOLLOW = ", ".join(name for name in COMPRESSIONS if not name.startswith(".t")) + " may follow"
IMAGE_EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".bmp",
    ".gif",
    ".webp",
    ".ppm",
    ".pgm",
    ".tif",
    ".tiff",
)
TEXT_EXTENSIONS = (".txt", ".text")


def kind_of(path: Path, extensions: Mapping[str, str]) -> str | None:
    """Returns the kind of source for a file's extension in upper or lower case, or None."""
    return extensions.get(Path(SHARD.sub("", plain_name(path))).suffix.lower())


def find_files(
    files: str | Sequence[str], extensions: Mapping[str, str], kind: str = ""
) -> list[Path]:
    """Returns the named files: a path, several joined by commas, a glob, or a folder.

    From a folder, returns those with an extension of the kind (or of any kind, if none is given),
    except licenses and readmes. Raises UserError, listing the existing files, if a file is missing.
    """
    if isinstance(files, str):
        files = (
            [files]
            if Path(files).expanduser().exists()
            else [part.strip() for part in files.split(",") if part.strip()]
        )
    return [path for part in files for path in expand(Path(part).expanduser(), extensions, kind)]


def expand(path: Path, extensions: Mapping[str, str], kind: str) -> list[Path]:
    """Returns the files of one path, glob or folder. Raises UserError if there are none."""
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [
            file
            for file in sorted(path.iterdir())
            if file.is_file() and is_data(file, extensions, kind)
        ]
        if not found:
            known = ", ".join(
                extension for extension, name in extensions.items() if kind in ("", name)
            )
            wanted = known or f"an extension of {kind} files"
            raise UserError(
                f"{path}: the folder has no file that ends in {wanted} ({MAY_FOLLOW}); "
                "name the files"
            )
        return found
    if glob.has_magic(str(path)):
        found = [
            Path(name)
            for name in sorted(glob.glob(str(path), recursive=True))
            if Path(name).is_file()
        ]
        if not found:
            raise UserError(f"{path}: no file matches; correct the pattern")
        return found
    if not path.parent.is_dir():
        raise UserError(f"{path}: no such file, nor the folder {path.parent}; correct the path")
    there = sorted(file.name for file in path.parent.iterdir())
    listed = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "") if there else "nothing"
    raise UserError(f"{path}: no such file{nearest(path.name, there)}; the folder has {listed}")


def is_data(file: Path, extensions: Mapping[str, str], kind: str = "") -> bool:
    """Returns whether a file in a folder is one of its data files."""
    known = kind_of(file, extensions)
    return (
        known is not None
        and kind in ("", known)
        and not file.name.upper().startswith(("LICENSE", "README", "."))
    )


def is_image(name: str) -> bool:
    """Returns whether a file's extension is that of an image."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def is_text(name: str) -> bool:
    """Returns whether a file in a class folder is a text."""
    stem, dot, ending = name.rpartition(".")
    if name.upper().startswith(("LICENSE", "README")):
        return False
    return not dot or (bool(stem) and f".{ending.lower()}" in TEXT_EXTENSIONS)
