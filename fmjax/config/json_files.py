"""JSON files, read with errors that a person can act on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fmjax.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object. Raises UserError if the file is missing or holds something else."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a Hugging Face model folder has one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not JSON ({error}); get the file again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a JSON {type(content).__name__}, not an object; get the file again")
    return content
