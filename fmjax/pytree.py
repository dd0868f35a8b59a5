"""Names of tree paths: parameters are selected by name, never by rank.

Stacked layers give biases and norm scales a leading axis, so the rule "decay everything of rank 2
or more" is wrong here. A regular expression on the slash-joined path is explicit (as in t5x and
big_vision)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from fmjax.contracts import PyTree
from fmjax.errors import UserError


def path_name(path: tuple[PyTree, ...]) -> str:
    """Returns a JAX key path as 'encoder/layers/mlp/up/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_named(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps `function(name, leaf, *other_leaves)` over a tree (and trees of the same structure)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest
    )


def names(tree: PyTree) -> dict[str, PyTree]:
    """Returns the leaves of a tree by slash-joined name, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unnames(flat: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Returns the nested dictionary of a flat one: the inverse of `names` on nested
    dictionaries.
    """
    tree: dict[str, PyTree] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def mask(tree: PyTree, patterns: Iterable[str], setting: str) -> PyTree:
    """Returns a tree of bool: whether any of the regular expressions is found in the leaf's name.

    Raises UserError, naming the config key `setting`, if a pattern is malformed or matches no leaf:
    a rule without effect is a mistake."""
    known = list(names(tree))
    found: set[str] = set()
    for pattern in patterns:
        check_pattern(setting, pattern)
        hits = [name for name in known if re.search(pattern, name)]
        if not hits:
            raise UserError(
                f'{setting}: "{pattern}" matches no parameter; names look like "{known[0]}", '
                f'"{known[-1]}"'
            )
        found.update(hits)
    return map_named(lambda name, _: name in found, tree)


def check_pattern(setting: str, pattern: str) -> None:
    """Raises UserError, naming the config key, for text that is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(
            f'{setting}: "{pattern}" is not a regular expression ({error}); correct it'
        ) from None


def merge(
    fresh: PyTree, loaded: PyTree, optional: Iterable[str], origin: str
) -> tuple[PyTree, list[str], list[str]]:
    """Returns a tree like `fresh` with the leaves of `loaded`, the names that stay fresh, and the
    unused loaded names.

    Only names that match one of the regular expressions `optional` may stay fresh or unused (such
    as a head of another shape). Raises UserError, listing all other missing, unexpected and
    misshapen names in groups."""
    ours, theirs = names(fresh), names(loaded)

    def free(name: str) -> bool:
        return any(re.search(pattern, name) for pattern in optional)

    fits = {name for name in ours if name in theirs and ours[name].shape == theirs[name].shape}
    left = [name for name in ours if name not in fits]
    unused = [name for name in theirs if name not in fits]
    problems = {
        "missing": [name for name in left if name not in theirs and not free(name)],
        "unexpected": [name for name in unused if name not in ours and not free(name)],
        "misshapen": [
            f"{name} {tuple(theirs[name].shape)}, expected {tuple(ours[name].shape)}"
            for name in left
            if name in theirs and not free(name)
        ],
    }
    if any(problems.values()):
        raise UserError(
            f"{origin}: these weights do not fit the model; {grouped(problems)}; set the model's "
            "sizes to theirs"
        )
    return map_named(lambda name, leaf: theirs[name] if name in fits else leaf, fresh), left, unused


def grouped(problems: Mapping[str, list[str]], most: int = 10) -> str:
    """Returns 'missing: a, b; misshapen: c' for the non-empty groups, with the first `most` names
    of each.
    """
    return "; ".join(
        f"{group} ({len(found)}): {', '.join(found[:most])}{', ...' if len(found) > most else ''}"
        for group, found in problems.items()
        if found
    )


def union(first: Mapping[str, PyTree], second: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Returns the nested dictionary of the leaves in either; those of the first win."""
    shared = [name for name in first if isinstance(first[name], dict) and name in second]
    return {**second, **first, **{name: union(first[name], second[name]) for name in shared}}
