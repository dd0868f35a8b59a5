"""Describes the keys of a config for the `--help` of commands that take one.

The description of a key is in `config/meanings.py`, or else in the comment beside its default in
`defaults.py`, in the `Settings` of the model's family or in the task's `Task`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import json
import tokenize
from collections.abc import Iterator, Mapping
from types import ModuleType

from ml_collections import ConfigDict

from fmjax import defaults, models, tasks
from fmjax.config import load_config
from fmjax.config.files import Config, Keys
from fmjax.config.meanings import COMMON, MODEL, TASK
from fmjax.contracts import Value

FIXED = ("model", "task")  # sections whose keys depend on the family and the task


def describe(spec: str) -> str:
    """Returns a line for each key of a config: its name, value and meaning.

    Without a config, describes the keys of all configs with their defaults. Raises UserError if the
    config does not exist.
    """
    known = comments_of(defaults) | COMMON
    if not spec:
        config = defaults.experiment("bert", "mlm")
        common = {name: section for name, section in config.items() if name not in FIXED}
        about = (
            "keys of every config, with their defaults (for those of one config: --config NAME "
            "--help):"
        )
        return "\n".join([about, *lines(common, known)])
    config = load_config(spec)
    known |= meanings("model", models.family(config.model.name).Settings, MODEL)
    for part in config.task.get("parts", {"": config.task}).values():
        known |= meanings("task", tasks.task(part.name).Task, TASK)
    return "\n".join(
        [
            f"keys, with the values of {spec} (none: unset; an unset model key takes its value "
            "from the size):",
            *lines(config, known),
        ]
    )


def meanings(section: str, settings: type, others: Mapping[str, str]) -> dict[str, str]:
    """Returns the descriptions of the keys of a section whose keys are the fields of a
    dataclass."""
    known = {**field_comments(settings), **others}
    return {f"{section}.{name}": text for name, text in known.items()}


def lines(config: Config, known: Mapping[str, str]) -> Iterator[str]:
    """Yields a line for each key of a config."""
    for path, value in values(config):
        written = (
            "none" if value is None else value if isinstance(value, str) else json.dumps(value)
        )
        entry = f"{'.'.join(path)}={written}"
        yield f"  {entry:<44}  {meaning(path, known)}".rstrip()


def values(config: Config, path: Keys = ()) -> Iterator[tuple[Keys, Value]]:
    """Yields the path and the value of every key; of a group only if it is empty."""
    for name, value in config.items():
        if isinstance(value, ConfigDict | Mapping) and value:
            yield from values(value, (*path, str(name)))
        else:
            yield (*path, str(name)), {} if isinstance(value, ConfigDict) else value


def meaning(path: Keys, known: Mapping[str, str]) -> str:
    """Returns the description of a key, or of the open group that it is in."""
    if path[:2] == ("task", "parts"):
        path = ("task", path[-1])
    names = (".".join(path[:length]) for length in range(len(path), 1, -1))
    return next((known[name] for name in names if name in known), "")


@functools.cache
def line_comments(module: ModuleType) -> dict[int, str]:
    """Returns the comment of each code line of a module, which is at its end or in the lines
    above."""
    source = inspect.getsource(module)
    found: dict[int, str] = {}
    above: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        number, column = token.start
        if token.type == tokenize.COMMENT:
            text = token.string.removeprefix("#").strip()
            if token.line[:column].strip():
                found[number] = text
            else:
                above.append(text)
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            if above and number not in found:
                found[number] = " ".join(above)
            above = []
    return found


@functools.cache
def comments_of(module: ModuleType) -> dict[str, str]:
    """Returns the comments on the config keys that a module's functions define.

    A function `optim` defines the section of that name, and so does `config.optim =
    ConfigDict({...})`.
    """
    comments = line_comments(module)
    found: dict[str, str] = {}
    for function in ast.parse(inspect.getsource(module)).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        for statement in function.body:
            section = ""
            if isinstance(statement, ast.Return):
                section = function.name
            elif isinstance(statement, ast.Assign) and isinstance(
                statement.targets[0], ast.Attribute
            ):
                section = statement.targets[0].attr
            for node in ast.walk(statement) if section else ():
                if isinstance(node, ast.Dict):
                    keys = {f"{section}.{key}": line for key, line in keys_of(node)}
                    found |= {key: comments[line] for key, line in keys.items() if line in comments}
                    break
    return found


def keys_of(node: ast.Dict, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yields the keys of a dictionary, and of those in it, each with its line."""
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield f"{prefix}{key.value}", key.lineno
            if isinstance(value, ast.Dict):
                yield from keys_of(value, f"{prefix}{key.value}.")


def field_comments(settings: type) -> dict[str, str]:
    """Returns the comments on the fields of a dataclass, including inherited ones."""
    found: dict[str, str] = {}
    for own in reversed(settings.__mro__):
        if not dataclasses.is_dataclass(own):
            continue
        module = inspect.getmodule(own)
        assert module is not None
        comments = line_comments(module)
        tree = ast.parse(inspect.getsource(module))
        classes = {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
        for node in classes.get(own.__name__, ()):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and node.lineno in comments
            ):
                found[node.target.id] = comments[node.lineno]
    return found
