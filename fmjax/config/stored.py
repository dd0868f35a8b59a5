"""The config that a run stores, `RUN/config.json`: written whole, read back, and compared when the run is continued."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmjax import __version__
from fmjax.config.files import Config, Keys, leaves, message_of, to_dict
from fmjax.errors import UserError, nearest

CONFIG = "config.json"
SCHEMA = 1  # of config.json; raised when an older reader would misread it
READING = ("on_error", "workers", "prefetch", "stall_seconds")  # keys of `data` on which no batch depends
LISTED = 10  # differences that an error lists


def write_config(workdir: Path, config: Config, given: Config | None = None) -> None:
    """Writes RUN/config.json, wholly or not at all: the resolved config, and in "fmjax" the one given for it.

    Raises UserError if the folder cannot be written to, or holds a `config.json` that is not a run's.
    """
    path, temporary = workdir / CONFIG, workdir / f"{CONFIG}.new"
    if path.exists():
        read_config(workdir)
    content = {key: value for key, value in to_dict(config).items() if key != "fmjax"}
    origin = content if given is None else to_dict(given)
    header = {"version": __version__, "schema": SCHEMA, "given": origin}
    text = json.dumps({"fmjax": header} | content, indent=1, ensure_ascii=False)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise UserError(f"{path}: {reason}; make room, mend its rights, or name another folder") from error


def is_run(folder: str | Path) -> bool:
    """Returns whether a folder has the `config.json` of a run, which is written last when a run begins.

    Raises UserError if the file is there and cannot be read.
    """
    path = Path(folder) / CONFIG
    try:
        return "fmjax" in json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, RecursionError):
        return False
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); fix its permissions, or name another folder"
        ) from None


def read_config(workdir: Path) -> dict[str, Any]:
    """Returns what `write_config` stored, as JSON holds it; its key "fmjax" has `version`, `schema`, `given`.

    Raises UserError if there is none, or it is not a run's.
    """
    path = workdir / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        runs = {found.parent.name for found in workdir.parent.glob(f"*/{CONFIG}")} - {workdir.name}
        reason = f"cannot be read, {(error.strerror or 'unknown error').lower()}"
        raise UserError(f"{path}: {reason}; name the folder of a run{nearest(workdir.name, runs)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({message_of(error)}); restore it or start a new run") from error
    content = content if isinstance(content, dict) else {}
    header = content.get("fmjax")
    if header is None and "model_type" in content:
        kind = f'belongs to Hugging Face weights (model_type "{content["model_type"]}"), not to a run'
        raise UserError(f"{path}: {kind}; make one: python scripts/convert.py --from {workdir} --to RUN")
    match header:
        case {"schema": int(schema), "given": dict(), "version": str(version)}:
            if schema > SCHEMA:
                raise UserError(f"{path}: was written by a newer fmjax, {version}; update fmjax to read it")
            return content
    raise UserError(f'{path}: has no valid key "fmjax", so it is not a run\'s; name the folder of a run')


def check_resumable(stored: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises UserError with the differences, unless a run may be continued with them.

    These may differ: `checkpoint`, `mesh`, keys ending in `_every`, how data are read (`READING`); `train.steps` or
    `train.epochs` may grow.
    """
    lines = [_line(*change) for change in _changes(stored, new) if not _may_change(*change)]
    if lines:
        more = f"; and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
        raise UserError(
            f"the run was begun with another config: {'; '.join(lines[:LISTED])}{more}; "
            "drop what has changed, or start a new run in another --workdir"
        )


def _may_change(path: Keys, before: Any, after: Any) -> bool:
    if path[0] in ("checkpoint", "mesh") or path[-1].endswith("_every") or (path[0] == "data" and path[-1] in READING):
        return True
    length = path in (("train", "steps"), ("train", "epochs"))
    return length and None not in (before, after) and after > before


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[Keys, Any, Any]]:
    before, after = dict(leaves(to_dict(old))), dict(leaves(to_dict(new)))
    pairs = ((path, before.get(path), after.get(path)) for path in before | after)
    # Another model or task changes many keys besides its name, which says the most.
    return sorted((pair for pair in pairs if pair[1] != pair[2]), key=lambda pair: pair[0][-1] != "name")


def _line(path: Keys, before: Any, after: Any) -> str:
    old, new = ("(absent)" if it is None else json.dumps(it, ensure_ascii=False) for it in (before, after))
    return f"{'.'.join(path)}: {old} -> {new}"
