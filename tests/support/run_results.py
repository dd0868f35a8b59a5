"""What runs leave behind, and whether two left the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmjax import pytree
from fmjax.runs.checkpoint import CheckpointReader

RATES = ("tokens_per_second", "mfu", "data_wait")


def records(workdir: Path) -> list[dict[str, Any]]:
    """Returns what metrics.jsonl says, without what depends on the time."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in RATES} for line in lines]


def items(workdir: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Returns all arrays of a run's newest checkpoint."""
    reader = CheckpointReader(workdir / "checkpoints")
    step = reader.latest() if step is None else step
    stored = json.loads((workdir / "checkpoints" / str(step) / "manifest.json").read_text())["items"]
    abstract = {item: pytree.unnames({name: shape(leaves[name]) for name in leaves}) for item, leaves in stored.items()}
    return {name: np.asarray(leaf) for name, leaf in pytree.names(reader.restore(step, abstract)).items()}


def shape(text: str) -> jax.ShapeDtypeStruct:
    dtype, _, sizes = text.rstrip("]").partition("[")
    return jax.ShapeDtypeStruct(tuple(int(size) for size in sizes.split(",") if size), dtype)


def equal(one: Path, other: Path) -> None:
    """Checks that two runs ended alike, to the bit, and have the same history."""
    ours, theirs = items(one), items(other)
    assert list(ours) == list(theirs) and any("opt_state" in name for name in ours)
    for name in ours:
        assert ours[name].tobytes() == theirs[name].tobytes(), name
    assert records(one) == records(other)
