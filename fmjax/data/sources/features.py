"""Class labels by name, as Hugging Face's `datasets` describes its columns (`features`, JSON).

Labels become names ("positive", "B-PER"), so they look the same as in other sources, tags work as
tags, and the order of the numbers does not matter. The label -1, which marks missing labels in
GLUE's test sets, becomes None.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from fmjax.contracts import Record, Value

LISTS = ("Sequence", "List", "LargeList")


def features_of(metadata: Mapping[bytes, bytes] | None) -> Record:
    """Returns the features that `datasets` wrote into a schema; empty if there are none."""
    try:
        found = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def has_labels(feature: Value) -> bool:
    """Returns whether a feature is a class label or contains some."""
    if isinstance(feature, list):
        return any(map(has_labels, feature))
    if not isinstance(feature, dict):
        return False
    return feature.get("_type") == "ClassLabel" or any(
        has_labels(part) for part in feature.values()
    )


def decode(feature: Value, value: Value) -> Value:
    """Returns a value in which the numbers of class labels are replaced by names.

    Raises ValueError for a number that has no name.
    """
    if value is None or not isinstance(feature, dict | list):
        return value
    if isinstance(feature, list):
        return [decode(feature[0], part) for part in value]
    if feature.get("_type") == "ClassLabel":
        return label(feature.get("names"), value)
    if feature.get("_type") in LISTS:
        inner = feature["feature"]
        if isinstance(value, dict):  # a list of structs is stored as a struct of lists
            return {
                name: [decode(inner.get(name), item) for item in part]
                for name, part in value.items()
            }
        return [decode(inner, part) for part in value]
    return (
        {name: decode(feature.get(name), part) for name, part in value.items()}
        if isinstance(value, dict)
        else value
    )


def label(names: Sequence[str] | None, value: str | int) -> str | None:
    """Returns the name of a class label. Raises ValueError for a number without a name."""
    if isinstance(value, str):
        return value
    if value == -1:
        return None
    if names is None:
        return str(value)
    if not 0 <= value < len(names):
        raise ValueError(
            f"label {value} is out of range; the {len(names)} names from 0 on are "
            f"{', '.join(names[:10])}"
        )
    return names[value]
