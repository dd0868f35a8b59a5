"""Starting a run from weights: takes the model's sizes from them, and matches classifier rows to
labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from fmjax import pytree, tasks
from fmjax.contracts import Config, PyTree, Task
from fmjax.distributed.hosts import say
from fmjax.errors import UserError, one_of
from fmjax.hub.reference import class_names
from fmjax.inference.export import special_type
from fmjax.inference.pretrained import Pretrained, abstract_params

Labels: TypeAlias = tuple[str, ...]

# With other weights, only these parameters may be newly initialized.
FRESH = ("^head/", "^encoder/pooler/")
PLACEHOLDER = "label_"  # LABEL_0, LABEL_1, ...: Hugging Face's default class names
NUMBER: Labels = ("(a number)",)  # in place of labels
IN_PLACE: tuple[int, ...] = ()  # the rows do not change
SHOWN = 10  # number of labels in a message


def origin_of(config: Config) -> str:
    return f"init.weights={config['init']['weights']}"


def start_from(config: Config, source: Pretrained, overridden: Collection[str]) -> Config:
    """Returns the config of a run that starts from weights, with their sizes.

    Sizes in a config file are for a model from random weights, and are overridden. The config also
    gets the Hugging Face type of the weights, if a family has several.

    Raises UserError, with both values, for a size among the `overridden` keys that differs.
    """
    section = dict(config["model"])
    if section["name"] == source.family.name:
        check_sizes(origin_of(config), section, source, overridden)
    if source.task is None:
        kind = special_type(source.config, source.family.name)
    else:
        kind = source.config.get("init", {}).get("model_type", "")
    noted = {"model_type": kind} if kind else {}
    return config | {"model": section, "init": config["init"] | noted}


def check_sizes(
    origin: str, section: Config, source: Pretrained, overridden: Collection[str]
) -> None:
    """Removes sizes that differ from those of the weights from the `model` section, and prints
    them."""
    theirs = dataclasses.asdict(source.model.settings)
    given = {name: (value, f"model.{name}") for name, value in section.items() if name in theirs}
    if (size := section.pop("size", None)) is not None:
        known = source.family.sizes  # a family outside fmjax may have none
        if known:
            one_of("model.size", size, known)
        named = known.get(size, {})
        given = {name: (value, "model.size") for name, value in named.items()} | given
    # Only whole numbers and booleans affect the shapes of parameters.
    other = {
        name: value
        for name, (value, _) in given.items()
        if isinstance(value, int) and value != theirs[name]
    }
    if not other or fits(source, other):
        return
    # Together they do not fit. Blame those that do not fit individually, if any.
    sizes = [name for name, value in other.items() if not fits(source, {name: value})] or [*other]
    for name in sizes:
        key = given[name][1]
        if key in overridden:
            value = f"{size}, which is {name}={other[name]}" if key == "model.size" else other[name]
            raise UserError(
                f"{key}={value}, but {origin} has {name}={theirs[name]}; "
                f"leave {key} out to use the size of the weights"
            )
        section.pop(name, None)
    listed = ", ".join(f"{name}={theirs[name]} (not {other[name]})" for name in sizes)
    say(f"{origin}: the sizes of the weights replace those of the config: {listed}")


def fits(source: Pretrained, changes: Config) -> bool:
    """Returns whether the parameters of weights fit a model with changed settings."""
    settings = dataclasses.asdict(source.model.settings) | changes
    try:
        model = source.family.build(heads=source.model.heads, **settings)
        params = source.family.fit_params(source.params, model.settings)
        pytree.merge(abstract_params(model), params, FRESH, "")
    except UserError:
        return False
    return True


def starting_weights(
    config: Config, source: Pretrained, model: PyTree, task: Task, abstract: PyTree
) -> PyTree:
    """Returns the parameters to start from, and prints which classifiers change.

    Args:
      config: the run's.
      source: the model that they come from.
      model: the run's, with the heads of all parts of a mixture.
      task: the run's, with its labels.
      abstract: the run's parameters, or their shapes.

    Raises UserError if they do not fit the model.
    """
    params, lines = fit_heads(
        source.family.fit_params(source.params, model.settings), source, model, task
    )
    pytree.merge(abstract, params, FRESH, origin_of(config))
    for line in lines:
        say(f"{origin_of(config)}: {line}")
    return params


def completed(
    config: Config,
    abstract: PyTree,
    weights: PyTree,
    fresh: Callable[[Collection[str]], Mapping[str, PyTree]],
) -> PyTree:
    """Returns all parameters of a run: those of the weights, and fresh ones where there are none;
    says which.

    Args:
      config: the run's.
      abstract: the run's parameters, or their shapes.
      weights: the parameters to start from.
      fresh: returns the newly initialized parameters of the given names.
    """
    origin = origin_of(config)
    params, kept, unused = pytree.merge(abstract, weights, FRESH, origin)
    say(f"{origin}: fresh {', '.join(kept) or 'none'}; not used {', '.join(unused) or 'none'}")
    return pytree.unnames({**pytree.names(params), **fresh(kept)})


def fit_heads(
    params: PyTree, source: Pretrained, model: PyTree, task: Task
) -> tuple[PyTree, list[str]]:
    """Returns parameters with the rows of classifiers in the order of a task's labels.

    Rows are matched by name. A head whose labels differ from those of the weights is left out, so
    that it is newly initialized; only its last layer depends on the labels.

    Args:
      params: those of `source`, fitted to the model otherwise.
      source: the model that they come from.
      model: the run's, with the heads of all parts of a mixture.
      task: the run's, with its labels.

    Returns the parameters, and a line about each head whose labels differ or have another order.
    """
    flat, lines = pytree.names(params), []
    theirs = dict(labels_by_head(source))
    for head, ours in labels_of(task):
        held = any(name.startswith(f"head/{head}/") for name in flat)
        order = rows(ours, theirs[head]) if held else IN_PLACE
        if order == IN_PLACE or order == tuple(range(len(order or ()))):
            continue
        axes = class_axes(model, head)
        both = f"the run has {listed(ours)}, the weights {listed(theirs[head])}"
        if order is None:
            flat = {name: leaf for name, leaf in flat.items() if name not in axes}
            lines.append(f"head/{head} is newly initialized: {both}{unnamed(theirs[head])}")
        else:
            flat |= {name: np.take(flat[name], order, axis) for name, axis in axes.items()}
            lines.append(f"head/{head} has its rows matched by label name: {both}")
    return pytree.unnames(flat), lines


def labels_of(task: Task) -> Iterator[tuple[str, Labels]]:
    """Yields each classification head and its labels; NUMBER for regression."""
    for part in task.tasks.values():
        for head, numbers in part.heads.items():
            if "classes" in numbers:
                yield head, NUMBER if part.kind == "regression" else tuple(map(str, part.labels))


def labels_by_head(source: Pretrained) -> Iterator[tuple[str, Labels]]:
    """Like `labels_of`, for a run or for each head in a Hugging Face folder."""
    if source.task is not None:
        yield from labels_of(tasks.make(source.config["task"]))
        return
    labels = class_names(source.config)
    problem = source.config.get("problem_type") or ("regression" if len(labels) == 1 else "")
    for head in source.params.get("head", {}):
        yield head, NUMBER if problem == "regression" and head == "classify" else labels


def rows(ours: Labels, theirs: Labels) -> tuple[int, ...] | None:
    """Returns the index of each of our labels among theirs; None if the labels differ.

    Labels match if they only differ in case, or if they are numbers and the others are LABEL_0,
    LABEL_1.
    """
    if NUMBER in (ours, theirs):
        return IN_PLACE if ours == theirs else None
    for spell in (str, str.casefold, lambda label: label.casefold().removeprefix(PLACEHOLDER)):
        own, others = [list(map(spell, labels)) for labels in (ours, theirs)]
        if len(set(own)) == len(own) and sorted(own) == sorted(others):
            return tuple(map(others.index, own))
    return None


def class_axes(model: PyTree, head: str) -> dict[str, int]:
    """Returns the parameters of a head that have one row per class, and the axis of those rows."""
    numbers = model.heads[head]
    more = numbers | {"classes": numbers["classes"] + 1}
    one, other = (
        pytree.names(abstract_params(model.clone(heads={head: it}))) for it in (numbers, more)
    )
    return {
        name: next(axis for axis, size in enumerate(leaf.shape) if size != other[name].shape[axis])
        for name, leaf in one.items()
        if leaf.shape != other[name].shape
    }


def listed(labels: Sequence[str]) -> str:
    """Returns labels in order, in the form used in messages."""
    return ", ".join(labels[:SHOWN]) + (", ..." if len(labels) > SHOWN else "")


def unnamed(labels: Labels) -> str:
    """Returns what to do about weights whose classes have no names."""
    if not all(label.casefold().startswith(PLACEHOLDER) for label in labels):
        return ""
    return "; to keep it, list its labels in id2label in config.json"
