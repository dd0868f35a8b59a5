"""The configs that come with fmjax, which a command line may name without their path:
`--config bert_mlm:tiny`."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
FOLDER = "configs"


def shipped_folder() -> Path:
    """Returns the folder of these configs: in the installed package, or beside it in a checkout."""
    inside = PACKAGE / FOLDER
    return inside if inside.is_dir() else PACKAGE.parent / FOLDER


def shipped_configs() -> dict[str, Path]:
    """Returns their files by name, such as "bert_mlm"."""
    files = sorted(shipped_folder().glob("*.py"))
    return {file.stem: file for file in files if file.stem != "__init__"}


def find_shipped(path: Path) -> Path | None:
    """Returns the config that NAME or configs/NAME.py refers to if there is no such file, or
    None."""
    named = path if path.suffix else path.with_suffix(".py")
    bare = path.parent == Path() and not path.suffix
    if bare or named.parent == Path(FOLDER):
        return shipped_configs().get(named.stem)
    return None


def listing() -> str:
    """Returns a line for each config: its name, and the first line of its docstring."""
    files = shipped_configs()
    width = max(map(len, files), default=0)
    return "\n".join(f"{name:{width}}  {first_line(file)}" for name, file in files.items())


def first_line(file: Path) -> str:
    """Returns the first line of a file's docstring; the file is not executed."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]
