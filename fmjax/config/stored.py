"""The config that a run stores, `RUN/config.json`: written atomically, read, and compared when the
run is continued.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fmjax import __version__
from fmjax.config.files import Config, Keys, leaves, message_of, renamed, to_dict
from fmjax.config.json_files import parse_json, write_json
from fmjax.contracts import Value
from fmjax.errors import UserError, nearest
from fmjax.filesystems.buckets import BucketPath
from fmjax.filesystems.paths import RunPath

CONFIG = "config.json"
SCHEMA = 1  # of config.json; raised when older readers would misread it
STOPPING = "early_stopping"  # keys of `train`: the end of a run changes no step
READING = (
    "on_error",
    "store",
    "verify",
    "workers",
    "prefetch",
    "stall_seconds",
)  # keys of `data` on which no batch depends
PLACES = ("files", "data_dir", "tokenizer")  # keys of `data` that locate the data
LENGTH = ("steps", "epochs")  # keys of `train` that may grow
BUCKETS = ("data", "buckets")
KERNEL = ("model", "attention")  # depends on the machine
WEIGHTS = ("init", "weights")
LISTED = 10  # number of differences that an error lists


def write_config(workdir: RunPath, config: Config, given: Config | None = None) -> None:
    """Writes RUN/config.json atomically: the resolved config and, under "fmjax", the config as
    given.

    Raises UserError if the folder cannot be written to, or contains a `config.json` that does not
    belong to a run."""
    path = workdir / CONFIG
    if path.exists():
        read_config(workdir)
    content = {key: value for key, value in to_dict(config).items() if key != "fmjax"}
    origin = content if given is None else to_dict(given)
    header = {"version": __version__, "schema": SCHEMA, "given": origin}
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, {"fmjax": header} | content)
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise UserError(
            f"{path}: {reason}; free disk space, fix its permissions, or name another folder"
        ) from error


def is_run(folder: RunPath) -> bool:
    """Returns whether a folder is a run directory: its `config.json` has the key `fmjax`.

    Raises UserError if reading the file is not permitted, and OSError if a bucket does not answer.
    """
    path = folder / CONFIG
    try:
        return "fmjax" in json.loads(path.read_text(encoding="utf-8-sig"))
    except PermissionError:
        raise UserError(f"{path}: cannot be read; fix its permissions") from None
    except OSError as error:
        if isinstance(path, BucketPath) and not isinstance(error, FileNotFoundError):
            raise
        return False
    except (ValueError, TypeError):
        return False


def read_config(workdir: RunPath) -> dict[str, Value]:
    """Returns the stored config as JSON values; its key "fmjax" has `version`, `schema` and
    `given`.

    Raises UserError if there is none, or it does not belong to a run, and OSError if a bucket does
    not answer.
    """
    path = workdir / CONFIG
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        if isinstance(path, BucketPath) and not isinstance(error, FileNotFoundError):
            raise
        beside = workdir.parent.glob(f"*/{CONFIG}") if isinstance(workdir, Path) else ()
        runs = {found.parent.name for found in beside} - {workdir.name}
        reason = f"cannot be read, {(error.strerror or 'unknown error').lower()}"
        raise UserError(
            f"{path}: {reason}; name the folder of a run{nearest(workdir.name, runs)}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: is not JSON ({message_of(error)}); restore the file or start a new run"
        ) from error
    content = content if isinstance(content, dict) else {}
    header: Value = content.get("fmjax")
    if header is None and "model_type" in content:
        kind = f'is from a Hugging Face model (model_type "{content["model_type"]}"), not to a run'
        raise UserError(
            f"{path}: {kind}; create a run: python scripts/convert.py --from {workdir} --to RUN"
        )
    match header:
        case {"schema": int(schema), "given": dict(given), "version": str(version)}:
            if schema > SCHEMA:
                raise UserError(
                    f"{path}: was written by a newer fmjax, {version}; update fmjax to read it"
                )
            return renamed(content) | {"fmjax": {**header, "given": renamed(given)}}
    raise UserError(
        f'{path}: has no valid key "fmjax", so it is not a run\'s; name the folder of a run'
    )


def check_resumable(
    stored: Mapping[str, Value], new: Mapping[str, Value], run: str | RunPath = "RUN"
) -> None:
    """Raises UserError, with the differences, unless they are allowed in a continued run.

    These may differ: `checkpoint`, `mesh`, `model.attention`, keys ending in `_every`, how data is
    read (`READING`), `train.early_stopping`, the location of the data (`is_place`), which is
    identified by its content, and empty keys that the run did not have; `train.steps` or
    `train.epochs` may grow.
    `data.buckets=auto` keeps the lengths of the run. `run` is the run's folder."""
    changes = [change for change in _changes(stored, new) if not _may_change(*change)]
    lines = [_line(*change) for change in changes]
    if lines:
        more = f"; and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
        moved = next((before for path, before, _ in changes if path == WEIGHTS and before), "")
        kept = (
            f"use init.weights={moved} again, which need not exist any more, since the run "
            "continues from its checkpoint; "
        )
        raise UserError(
            f"the run was started with another config: {'; '.join(lines[:LISTED])}{more}; "
            f"{kept if moved else ''}undo these changes, or start a new run in another --workdir, "
            "from these weights with "
            f"--config.init.weights={run}"
        )


def continued(workdir: RunPath, given: Mapping[str, Value]) -> dict[str, Value]:
    """Returns the resolved config that a run stores; keys that may change at a restart are taken
    from the given config.

    Raises UserError with the differences if anything else has changed.
    """
    stored = read_config(workdir)
    check_resumable(stored["fmjax"]["given"], given, workdir)
    config = {key: value for key, value in stored.items() if key != "fmjax"}
    every = {
        key: value
        for key, value in given["train"].items()
        if key.endswith("_every") or key in (*LENGTH, STOPPING)
    }
    # The location of the data is taken from the given config: nothing else may differ there.
    read = {
        key: given["data"][key] for key in (*READING, *PLACES, "mixture") if key in given["data"]
    }
    own = {key: value for key, value in config["model"].items() if key != KERNEL[1]}
    kernel = {key: value for key, value in given["model"].items() if key == KERNEL[1]}
    return config | {
        "model": own | kernel,
        "data": config["data"] | read,
        "checkpoint": given["checkpoint"],
        "mesh": given["mesh"],
        "train": config["train"] | every,
    }


def _may_change(path: Keys, before: Value, after: Value) -> bool:
    if (
        path[0] in ("checkpoint", "mesh")
        or path == KERNEL
        or path[-1].endswith("_every")
        or (path[0] == "data" and path[-1] in READING)
    ):
        return True
    if path == BUCKETS and after == ["auto"]:  # the lengths that were chosen when the run started
        return True
    if before is None and after in ("", []):  # a key that is newer than the run, and unset
        return True
    if path[:2] == ("train", STOPPING) or (is_place(path) and None not in (before, after)):
        return True
    length = path[0] == "train" and path[1:] in [(key,) for key in LENGTH]
    return length and None not in (before, after) and after > before


def is_place(path: Keys) -> bool:
    """Returns whether a key locates data; `check_same_data` detects changes of the data itself."""
    mixed = path[:2] == ("data", "mixture") and len(path) > 3 and path[3] in ("files", "data_dir")
    return mixed or (path[0] == "data" and len(path) > 1 and path[1] in PLACES)


def _changes(old: Mapping[str, Value], new: Mapping[str, Value]) -> list[tuple[Keys, Value, Value]]:
    before, after = dict(leaves(to_dict(old))), dict(leaves(to_dict(new)))
    pairs = ((path, before.get(path), after.get(path)) for path in before | after)
    # Another model or task changes many keys; its name says the most.
    return sorted(
        (pair for pair in pairs if pair[1] != pair[2]), key=lambda pair: pair[0][-1] != "name"
    )


def _line(path: Keys, before: Value, after: Value) -> str:
    old, new = (
        "(absent)" if it is None else json.dumps(it, ensure_ascii=False) for it in (before, after)
    )
    return f"{'.'.join(path)}: {old} -> {new}"
