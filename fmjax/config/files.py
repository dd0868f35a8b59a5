"""Config files: Python with a function `get_config(arg: str = "") -> ml_collections.ConfigDict`, as
in big_vision.

A config file is the user's own code and is executed. A run stores its config as JSON, which is only
parsed (`stored.py`)."""

from __future__ import annotations

import inspect
import math
import traceback
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from ml_collections import ConfigDict

from fmjax.config.shipped import find_shipped, shipped_configs, shipped_folder
from fmjax.contracts import Value
from fmjax.errors import UserError, nearest

Config: TypeAlias = ConfigDict | Mapping[str, Value]
Keys = tuple[str, ...]
# Former names of keys, which stored configs and command lines may still use.
RENAMED = {("init", "from"): ("init", "weights")}


class OpenDict(ConfigDict):
    """A group with arbitrary keys, which may contain dots and keep their order."""

    def lock(self) -> OpenDict:
        """Does nothing: locking a config rejects misspelled keys only in groups with fixed keys."""
        return self


def open_dict(**values: Value) -> OpenDict:
    """Returns an open group. A config file replaces one by assigning another `open_dict`."""
    node = OpenDict(allow_dotted_keys=True, sort_keys=False)
    for key, value in values.items():
        node[key] = open_dict(**value) if isinstance(value, dict) else value
    return node


def arguments(arg: str, *choices: str) -> set[str]:
    """Returns the arguments of a config, such as "tiny,nsp", as a set. Raises UserError for an
    unknown one.
    """
    chosen = {word.strip() for word in arg.split(",")} - {""}
    for word in sorted(chosen):
        if word not in choices:
            offer = (
                f"choose from {', '.join(choices)}" if choices else "this config takes no arguments"
            )
            raise UserError(
                f'config argument "{word}" is not known{nearest(word, choices)}; {offer}'
            )
    return chosen


def load_config(spec: str) -> ConfigDict:
    """Returns the config of "path/to/file.py" or "path/to/file.py:arg,arg"; if there is no such
    file, of a config that comes with fmjax, "bert_mlm:arg" or "configs/bert_mlm.py:arg".

    Raises UserError if the file is missing, fails (the error names the line) or returns no config.
    """
    path, arg = find_config(spec)
    try:
        source = path.read_bytes()
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(f"--config={spec}: {reason}{_files_like(path)}") from error
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError(
                f'{path}: has no get_config; define `def get_config(arg: str = "")` in it'
            )
        if arg and not inspect.signature(get_config).parameters:
            raise UserError(f'{path}: takes no arguments; drop ":{arg}"')
        config = get_config(arg) if arg else get_config()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        cause = f"{type(error).__name__}: {message_of(error)}"
        raise UserError(f"{_where(error, path)}: {cause}; fix the config file") from error
    if not isinstance(config, ConfigDict):
        made = type(config).__name__
        raise UserError(f"{path}: get_config returned {made}; return an ml_collections.ConfigDict")
    return config


def find_config(spec: str) -> tuple[Path, str]:
    """Returns the file of a config, which may be missing, and its arguments."""
    head, separator, arg = spec.partition(".py:")
    try:
        path = Path(head + ".py" if separator else spec).expanduser()
    except RuntimeError as error:  # ~nobody
        raise UserError(f"--config={spec}: {error}; give the full path of the file") from None
    if path.is_file():
        return path, arg
    name, _, own = (str(path), "", arg) if path.suffix == ".py" else spec.partition(":")
    found = find_shipped(Path(name))
    return (path, arg) if found is None else (found, own)


def _files_like(path: Path) -> str:
    """Returns a hint at the intended config, in the named folder or in `configs`."""
    if str(path) == path.name and (path.stem in shipped_configs()):
        return f"; write --config {path.stem} to use the one that comes with fmjax"
    folders = (path.parent, Path("configs"), shipped_folder())
    found = [
        (at, sorted(file.name for file in at.glob("*.py") if file.stem != "__init__"))
        for at in folders
    ]
    for folder, names in sorted(found, key=lambda pair: not nearest(path.name, pair[1])):
        if names:
            return f"{nearest(path.name, names)}; {folder} has {', '.join(names)}"
    return "; name a Python file that defines get_config"


def _where(error: BaseException, path: Path) -> str:
    """Returns file:line of the last line in the config file that led to the error."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)


def message_of(error: BaseException) -> str:
    """Returns the message of an exception in one line."""
    return " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())


def to_dict(config: Config) -> dict[str, Value]:
    """Returns the config as JSON values: tuples become lists, unset keys are left out, and keys
    have their current names.

    Raises UserError for a value that JSON cannot represent.
    """
    return renamed(_plain(config, "config"))


def renamed(config: dict[str, Value]) -> dict[str, Value]:
    """Returns a config whose keys have their current names. If both names are set, the current one
    wins.
    """
    for (section, old), (_, new) in RENAMED.items():
        values = config.get(section)
        if isinstance(values, dict) and old in values:
            others = {key: value for key, value in values.items() if key != old}
            config = config | {section: {new: values[old]} | others}
    return config


def _plain(value: Value, name: str) -> Value:
    if isinstance(value, ConfigDict | Mapping):
        return {
            str(key): _plain(part, f"{name}.{key}")
            for key, part in value.items()
            if part is not None
        }
    if isinstance(value, list | tuple):
        return [_plain(element, f"{name}[{index}]") for index, element in enumerate(value)]
    finite = not isinstance(value, float) or math.isfinite(value)
    valid = not isinstance(value, str) or value == value.encode(errors="replace").decode()
    if value is not None and not (isinstance(value, bool | int | float | str) and finite and valid):
        use = "use finite numbers, text, booleans, and tuples or dicts of them"
        raise UserError(
            f"{name}={value!r} ({type(value).__name__}): JSON cannot represent it; {use}"
        )
    return value


def leaves(node: Config, path: Keys = ()) -> Iterator[tuple[Keys, Value]]:
    """Yields the path and the value of every key that is not a group."""
    for key, value in node.items():
        if isinstance(value, ConfigDict | dict):
            yield from leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value
