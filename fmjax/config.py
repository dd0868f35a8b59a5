"""Experiments as config files: loading, overriding single keys, storing with a run, comparing.

A config file is Python with a function `get_config(arg: str = "") -> ml_collections.ConfigDict`, as in
big_vision. It is the user's own code and is executed. What a run stores is JSON and is only ever parsed.

An override `--config.KEY=TEXT` reads TEXT by the type of the value, or placeholder, that KEY has:

- bool: true, false, yes, no, 1, 0; int: 20, 1_000, 1e3; float: 3e-4; str: the text as it stands;
- tuple: `a,b`, or a list in JSON or Python where an element has a comma; empty text is the empty tuple;
- what `placeholder(type)` made: `none` unsets it;
- a group of keys: a JSON object, which sets the keys it names, and replaces an open group as a whole.

Keys that are not there are refused, except in an open group (`open_dict`): the splits of `data.files`, the
axes of `mesh.axes`, the expressions of `optim.multipliers`.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import os
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from fmjax import __version__
from fmjax.errors import UserError, nearest

CONFIG = "config.json"
SCHEMA = 1  # of config.json; raised when an older reader would misread it
READING = ("on_error", "workers", "prefetch", "stall_seconds")  # keys of `data` on which no batch depends
LISTED = 10  # differences that an error lists
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

Config: TypeAlias = ConfigDict | Mapping[str, Any]
Keys = tuple[str, ...]


class OpenDict(ConfigDict):
    """A group whose keys are free, may contain dots, and keep the order they were given in."""

    def lock(self) -> OpenDict:
        """Does nothing: locking a config keeps misspelt keys out of the groups whose keys are fixed."""
        return self


def open_dict(**values: Any) -> OpenDict:
    """Returns an open group. A config file replaces one by assigning another `open_dict`."""
    node = OpenDict(allow_dotted_keys=True, sort_keys=False)
    for key, value in values.items():
        node[key] = open_dict(**value) if isinstance(value, dict) else value
    return node


def arguments(arg: str, *choices: str) -> set[str]:
    """Returns the arguments of a config, "tiny,nsp", as a set. Raises UserError for one not among them."""
    chosen = {word.strip() for word in arg.split(",")} - {""}
    for word in sorted(chosen):
        if word not in choices:
            offer = f"choose from {', '.join(choices)}" if choices else "this config takes none"
            raise UserError(f'config argument "{word}" is not known{nearest(word, choices)}; {offer}')
    return chosen


def load_config(spec: str) -> ConfigDict:
    """Returns the config of "path/to/file.py" or "path/to/file.py:arg,arg".

    Raises UserError if the file is missing, fails (naming the line) or makes no config.
    """
    head, separator, arg = spec.partition(".py:")
    path = Path(head + ".py" if separator else spec)
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
            raise UserError(f'{path}: has no get_config; define `def get_config(arg: str = "")` in it')
        if arg and not inspect.signature(get_config).parameters:
            raise UserError(f'{path}: takes no arguments; drop ":{arg}"')
        config = get_config(arg) if arg else get_config()
    except UserError:
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {_message(error)}"
        raise UserError(f"{_where(error, path)}: {cause}; mend the config file") from error
    if not isinstance(config, ConfigDict):
        made = type(config).__name__
        raise UserError(f"{path}: get_config returned {made}; return an ml_collections.ConfigDict")
    return config


def _files_like(path: Path) -> str:
    """Returns a hint at the config that was meant, in the folder that was named or in `configs`."""
    here = Path(__file__).parent
    folders = (path.parent, Path("configs"), here.parent / "configs", here / "configs")
    found = [(at, sorted(file.name for file in at.glob("*.py") if file.stem != "__init__")) for at in folders]
    for folder, names in sorted(found, key=lambda pair: not nearest(path.name, pair[1])):
        if names:
            return f"{nearest(path.name, names)}; {folder} has {', '.join(names)}"
    return "; name a Python file that defines get_config"


def _where(error: Exception, path: Path) -> str:
    """Returns file:line of the last line in the config file that led to the error."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _message(error: Exception) -> str:
    return " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())


def apply_overrides(config: ConfigDict, overrides: Sequence[tuple[str, str]]) -> None:
    """Sets dotted keys from text, in place and in order; the head of this file has the grammar.

    Raises UserError for a key that is not there, with its neighbours, and for text that is not of its type.
    """
    for key, text in overrides:
        _override(config, "config", key.split("."), text, config)


def _override(node: ConfigDict, path: str, keys: Sequence[str], text: str, root: ConfigDict) -> None:
    key, *rest = keys
    name, override = f"{path}.{key}", f"{path}.{'.'.join(keys)}={text}"
    if key not in node:
        if not isinstance(node, OpenDict) or not key:
            hint = _nearest(keys, node, root)
            raise UserError(f"{override}: no such key{hint}; {path} has {_names(node)}")
        if rest:
            raise UserError(f"{override}: a new key with a dot needs the form --{path}='{{\"KEY\": VALUE}}'")
    field = dict(node.items(preserve_field_references=True)).get(key)
    if rest and not isinstance(field, ConfigDict):
        raise UserError(f"{override}: {name} is a value and not a group of keys; write --{name}=VALUE")
    if rest:
        _override(node[key], name, rest, text, root)
    elif isinstance(field, ConfigDict):
        _override_group(node, key, name, text, root)
    elif isinstance(node, OpenDict):
        with node.ignore_type():
            node[key] = _parse_free(name, text, list(node.values()))
    elif isinstance(field, FieldReference):
        unset = text.strip().lower() == "none"
        node[key] = None if unset else _parse(name, text, field.get_type(), field.get())
    else:
        node[key] = _parse(name, text, type(field), field)


def _override_group(node: ConfigDict, key: str, name: str, text: str, root: ConfigDict) -> None:
    group, values = node[key], _literal(text)
    if not isinstance(values, dict):
        form = f"write --{name}.KEY=VALUE or a JSON object"
        raise UserError(f"{name}={text}: {name} is a group of keys ({_names(group)}); {form}")
    if None in values.values():
        raise UserError(f"{name}={text}: null is no value; leave that key out, or use --{name}.KEY=none")
    if isinstance(group, OpenDict):
        old = list(group.values())
        new = {k: _parse_free(f"{name}.{k}", json.dumps(v), old) for k, v in values.items()}
        node[key] = open_dict(**new)
    else:
        for k, v in values.items():
            _override(group, name, [k], _text(v), root)


def _nearest(keys: Sequence[str], node: ConfigDict, root: ConfigDict) -> str:
    """Returns a hint at the neighbour that was meant, or at a key of that name in another group."""
    same = [".".join(path) for path, _ in _leaves(root) if path[-1] == keys[-1]]
    return nearest(keys[0], map(str, node)) or (f' (did you mean "config.{same[0]}"?)' if same else "")


def _names(node: ConfigDict) -> str:
    return ", ".join(map(str, node)) or "none yet"


def _parse(name: str, text: str, kind: Any, present: Any = None) -> Any:
    """Returns the text as a `kind`; the elements of a tuple or list are of the type of those present."""
    if kind is str:
        return text
    if kind in (tuple, list):
        return kind(_parse_elements(name, text, present or ()))
    if kind in READERS:
        read, form = READERS[kind]
        try:
            return read(text)
        except (ValueError, KeyError):
            _refuse(name, text, kind.__name__, form)
    value = _free(_literal(text))
    if kind is not type(None) and not isinstance(value, kind):
        _refuse(name, text, getattr(kind, "__name__", str(kind)), "a value of that type")
    return value


def _read_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)
    # Beyond 2**53 a float does not tell one whole number from the next.
    if not number.is_integer() or abs(number) > 2**53:
        raise ValueError(text)
    return int(number)


READERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    bool: (lambda text: TRUTH[text.strip().lower()], "true or false"),
    int: (_read_int, "a whole number such as 100 or 1e3"),
    float: (float, "a number such as 0.1 or 3e-4"),
}


def _parse_elements(name: str, text: str, present: Sequence[Any]) -> list[Any]:
    kinds = {type(element) for element in present}
    kind = float if kinds == {int, float} else kinds.pop() if len(kinds) == 1 else None
    # A regular expression may begin with a bracket too; it is no literal then.
    values = _literal(text) if text.lstrip().startswith(("[", "(")) else text
    if not isinstance(values, tuple | list):
        values = [part.strip() for part in text.split(",")] if text.strip() else []
    if kind is None:
        return [_free(value) for value in values]
    if kind is str and not all(isinstance(value, str) for value in values):
        _refuse(name, text, "a tuple of str", 'a,b or ["a", "b"]')
    return [_parse(name, _text(value), kind) for value in values]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _parse_free(name: str, text: str, beside: Sequence[Any]) -> Any:
    """Returns a value of an open group: a number beside numbers, text or a list beside those, else either."""
    kinds = {type(value) for value in beside}
    value = _literal(text)
    if kinds and kinds <= {int, float}:
        if type(value) not in (int, float):
            _refuse(name, text, "a number, as beside it", "one such as 4 or 0.5")
        return value
    return text if kinds & {str, tuple} and not isinstance(value, str | tuple | list) else _free(value)


def _literal(text: str) -> Any:
    """Returns the value that the text spells in JSON or Python, without running anything; else the text."""
    for read in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings(action="ignore"):  # about the backslashes of regular expressions
                value = read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(value, bool | int | float | str | tuple | list | (dict if read is json.loads else str)):
            return value
    return text


def _free(value: Any) -> Any:
    """Returns lists as tuples and dicts as open groups."""
    if isinstance(value, list | tuple):
        return tuple(_free(element) for element in value)
    if isinstance(value, dict):
        return open_dict(**{str(key): _free(part) for key, part in value.items()})
    return value


def _refuse(name: str, text: str, kind: str, form: str) -> NoReturn:
    raise UserError(f'{name}={text}: expects {kind}, got "{text}"; write {form}')


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as JSON holds it: tuples as lists, unset keys left out.

    Raises UserError for a value that JSON cannot hold.
    """
    return _plain(config, "config")


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, ConfigDict | Mapping):
        return {str(key): _plain(part, f"{name}.{key}") for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_plain(element, f"{name}[{index}]") for index, element in enumerate(value)]
    finite = not isinstance(value, float) or math.isfinite(value)
    valid = not isinstance(value, str) or value == value.encode(errors="replace").decode()
    if value is not None and not (isinstance(value, bool | int | float | str) and finite and valid):
        use = "use finite numbers, text, booleans, and tuples or dicts of them"
        raise UserError(f"{name}={value!r} ({type(value).__name__}): JSON cannot hold it; {use}")
    return value


def given(node: ConfigDict) -> dict[str, Any]:
    """Returns the set keys of a group as keyword arguments: tuples stay tuples, groups become dicts."""
    values = {key: value for key, value in node.items() if value is not None}
    return {key: given(value) if isinstance(value, ConfigDict) else value for key, value in values.items()}


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
        raise UserError(f"{path}: is not JSON ({_message(error)}); restore it or start a new run") from error
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
    before, after = dict(_leaves(to_dict(old))), dict(_leaves(to_dict(new)))
    pairs = ((path, before.get(path), after.get(path)) for path in before | after)
    # Another model or task changes many keys besides its name, which says the most.
    return sorted((pair for pair in pairs if pair[1] != pair[2]), key=lambda pair: pair[0][-1] != "name")


def _leaves(node: Config, path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    for key, value in node.items():
        if isinstance(value, ConfigDict | dict):
            yield from _leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def _line(path: Keys, before: Any, after: Any) -> str:
    old, new = ("(absent)" if it is None else json.dumps(it, ensure_ascii=False) for it in (before, after))
    return f"{'.'.join(path)}: {old} -> {new}"
