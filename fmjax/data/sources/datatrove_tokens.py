"""Tokens that datatrove's `DocumentTokenizer` wrote. They are refused: without the texts, fmjax can
neither compare them with other data nor report on them, and only the name of their tokenizer is
known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fmjax.data.sources.kinds import SourceKind
from fmjax.errors import UserError


def refuse(paths: Sequence[Path], split: str) -> NoReturn:
    """Raises UserError, which says how to make a token store of the texts."""
    path = paths[0]
    try:
        lines = Path(f"{path}.metadata").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    name = lines[0].rpartition("|")[0] if lines else ""
    name = "" if name == "Unknown Tokenizer" else name
    by = f" by {name}" if name else ""
    raise UserError(
        f"{path}: has tokens that datatrove wrote{by}, without the texts that fmjax also needs; "
        "write them again from the texts, with python scripts/prepare_data.py --input TEXTS "
        f"--tokenizer {name or 'TOKENIZER'} --output FOLDER, and name FOLDER"
    )


SOURCES = (SourceKind("datatrove", refuse, extensions=(".ds",)),)
