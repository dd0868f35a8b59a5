"""Overrides of config keys: `--config.KEY=TEXT` parses TEXT by the type of KEY's value or
placeholder.

- bool: true, false, yes, no, 1, 0; int: 20, 1e3; float: 3e-4; str: the text itself;
- tuple: `a,b`, or a list in JSON or Python where an element has a comma; empty text is the empty
  tuple;
- what `placeholder(type)` made: `none` unsets it;
- a group of keys: a JSON object, which sets the keys it names, and replaces an open group as a
  whole.

Unknown keys are errors, except in an open group (`open_dict`): the splits of `data.files`, the axes
of `mesh.axes`, the expressions of `optim.multipliers`."""

from __future__ import annotations

import ast
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from fmjax.config.files import RENAMED, OpenDict, leaves, load_config, open_dict, to_dict
from fmjax.config.json_files import DuplicateKey, parse_json
from fmjax.config.numbers import real, whole
from fmjax.contracts import Record, Value
from fmjax.errors import UserError, nearest

TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def apply_overrides(config: ConfigDict, overrides: Sequence[tuple[str, str]]) -> None:
    """Sets dotted keys from text, in place and in order. The docstring of this file has the
    grammar.

    Raises UserError, with suggestions, for an unknown key, and for text that does not fit the key's
    type."""
    for key, text in overrides:
        _override(config, "config", key.split("."), text, config)


def overridden_keys(overrides: Sequence[tuple[str, str]]) -> frozenset[str]:
    """Returns the dotted keys that overrides set; a JSON object sets several."""
    keys: set[str] = set()
    for key, text in overrides:
        values = _literal(text)
        keys |= {f"{key}.{name}" for name in values} if isinstance(values, dict) else {key}
    return frozenset(keys)


def describe_config(
    config: str | os.PathLike[str], overrides: Mapping[str, Value] | None = None
) -> Record:
    """Returns the config of a config file, with overrides as Python values, as JSON values; None
    unsets a key.

    Raises UserError as `load_config` and `apply_overrides` do, and for a value that is not text, a
    path, a number, a list or a group."""
    described = load_config(os.fspath(config))
    apply_overrides(described, override_texts(overrides or {}))
    return to_dict(described)


def override_texts(overrides: Mapping[str, Value]) -> list[tuple[str, str]]:
    """Returns overrides with Python values in the form that `apply_overrides` takes. Raises
    UserError like `text_of`.
    """
    return [(key, text_of(key, value)) for key, value in overrides.items()]


def text_of(key: str, value: Value) -> str:
    """Returns the text of a Python value in an override. Raises UserError if there is none."""
    if value is None:
        return "none"
    try:
        plain = _plain(value)
        return plain if isinstance(plain, str) else json.dumps(plain)
    except (TypeError, ValueError):
        form = "use text, a path, a number, a list of these, or a dictionary"
        raise UserError(
            f"overrides: {key} is a {type(value).__name__}, which a config cannot contain; {form}"
        ) from None


def _plain(value: Value) -> Value:
    """Returns a value with paths as text, and arrays and their scalars as numbers."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic | np.ndarray) or hasattr(value, "__array__"):
        return np.asarray(value).tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _override(
    node: ConfigDict, path: str, keys: Sequence[str], text: str, root: ConfigDict
) -> None:
    key, *rest = keys
    _, present = RENAMED.get((path.removeprefix("config."), key), ("", key))
    key = present if present in node else key
    name, override = f"{path}.{key}", f"{path}.{'.'.join(keys)}={text}"
    if key not in node:
        if not isinstance(node, OpenDict) or not key:
            hint = _nearest(keys, node, root)
            raise UserError(f"{override}: no such key{hint}; {path} has {_names(node)}")
        if rest:
            raise UserError(
                f"{override}: a new key with a dot needs the form --{path}='{{\"KEY\": VALUE}}'"
            )
    field = dict(node.items(preserve_field_references=True)).get(key)
    if rest and not isinstance(field, ConfigDict):
        raise UserError(
            f"{override}: {name} is a single value, not a group of keys; write --{name}=VALUE"
        )
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
    elif field is not None or text.strip().lower() != "none":  # None is as the file left it
        node[key] = _parse(name, text, type(field), field)


def _override_group(node: ConfigDict, key: str, name: str, text: str, root: ConfigDict) -> None:
    group, values = node[key], _literal(text)
    if not isinstance(values, dict):
        form = f"write --{name}.KEY=VALUE or a JSON object"
        raise UserError(f"{name}={text}: {name} is a group of keys ({_names(group)}); {form}")
    if None in values.values():
        raise UserError(
            f"{name}={text}: null is not allowed; remove that key, or use --{name}.KEY=none"
        )
    if isinstance(group, OpenDict):
        old = list(group.values())
        new = {k: _parse_free(f"{name}.{k}", json.dumps(v), old) for k, v in values.items()}
        node[key] = open_dict(**new)
    else:
        for k, v in values.items():
            _override(group, name, [k], _text(v), root)


def _nearest(keys: Sequence[str], node: ConfigDict, root: ConfigDict) -> str:
    """Returns a hint at the most similar key, or at a key of that name in another group."""
    same = [".".join(path) for path, _ in leaves(root) if path[-1] == keys[-1]]
    return nearest(keys[0], map(str, node)) or (
        f' (did you mean "config.{same[0]}"?)' if same else ""
    )


def _names(node: ConfigDict) -> str:
    return ", ".join(map(str, node)) or "none yet"


def _parse(name: str, text: str, kind: Value, present: Value = None) -> Value:
    """Returns the text as a `kind`. The elements of a tuple or list get the type of the present
    ones.
    """
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
        return whole(text.strip())
    except ValueError:
        number = real(text.strip())
    # Beyond 2**53, a float cannot distinguish consecutive whole numbers.
    if not number.is_integer() or abs(number) > 2**53:
        raise ValueError(text)
    return int(number)


READERS: dict[Value, tuple[Callable[[str], Value], str]] = {
    bool: (lambda text: TRUTH[text.strip().lower()], "true or false"),
    int: (_read_int, "a whole number such as 100 or 1e3"),
    float: (lambda text: real(text.strip()), "a number such as 0.1 or 3e-4"),
}


def _parse_elements(name: str, text: str, present: Sequence[Value]) -> list[Value]:
    kinds = {type(element) for element in present}
    kind = float if kinds == {int, float} else kinds.pop() if len(kinds) == 1 else None
    # A regular expression may also begin with a bracket; then it is not a literal.
    values = _literal(text) if text.lstrip().startswith(("[", "(")) else text
    if not isinstance(values, tuple | list):
        values = [part.strip() for part in text.split(",")] if text.strip() else []
    if kind is None:
        return [_free(value) for value in values]
    if kind is str and not all(isinstance(value, str) for value in values):
        _refuse(name, text, "a tuple of str", 'a,b or ["a", "b"]')
    return [_parse(name, _text(value), kind) for value in values]


def _text(value: Value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _parse_free(name: str, text: str, beside: Sequence[Value]) -> Value:
    """Returns a value of an open group: a number if the others are numbers, text or a list if the
    others are, otherwise either.
    """
    kinds = {type(value) for value in beside}
    value = _literal(text)
    if kinds and kinds <= {int, float}:
        if type(value) not in (int, float):
            _refuse(name, text, "a number, like the others", "one such as 4 or 0.5")
        return value
    return (
        text if kinds & {str, tuple} and not isinstance(value, str | tuple | list) else _free(value)
    )


def _literal(text: str) -> Value:
    """Returns the value that the text spells in JSON or Python, without executing anything;
    otherwise the text.

    Raises UserError for a JSON object that has a key twice.
    """
    for read in (parse_json, _python_literal):
        try:
            with warnings.catch_warnings(
                action="ignore"
            ):  # about the backslashes of regular expressions
                value = read(text)
        except DuplicateKey as error:
            raise UserError(f"{text:.200}: {error}; remove one") from None
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(
            value, bool | int | float | str | tuple | list | (dict if read is parse_json else str)
        ):
            return value
    return text


def _python_literal(text: str) -> Value:
    """Returns the value of a Python literal. Raises ValueError for a number that JSON does not
    accept, such as 1_000.
    """
    tree = ast.parse(text.strip(" \t"), mode="eval")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float, complex):
            real(ast.get_source_segment(text.strip(" \t"), node) or "")
    return ast.literal_eval(tree)


def _free(value: Value) -> Value:
    """Returns lists as tuples and dicts as open groups."""
    if isinstance(value, list | tuple):
        return tuple(_free(element) for element in value)
    if isinstance(value, dict):
        return open_dict(**{str(key): _free(part) for key, part in value.items()})
    return value


def _refuse(name: str, text: str, kind: str, form: str) -> NoReturn:
    raise UserError(f'{name}={text}: expects {kind}, got "{text}"; write {form}')
