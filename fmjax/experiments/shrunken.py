"""Shrunken runs, for `--quick`: two steps of a tiny model on a few records of the text that ships
with Python, or on the digits that ship with scikit-learn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fmjax.config import apply_overrides, load_config, to_dict
from fmjax.config.json_files import write_atomically
from fmjax.contracts import Config
from fmjax.data.splits import open_split

# What is kept of an experiment's overrides; the other sections are those of the tiny config.
SECTIONS = ("task", "optim", "init")
STEPS = {
    "train.steps": "2",
    "train.epochs": "none",
    "train.eval_every": "0",
    "train.log_every": "1",
}
RECORDS = {"train": 300, "validation": 20}
SIZES = ("size", "width", "layers", "attention_heads", "mlp_width", "positions")
IMAGES = "digits"  # a source that is small already


def shrunken_config(spec: str, overrides: Mapping[str, str], folder: Path) -> Config:
    """Returns a config for two steps of a tiny model, on records that are written to a folder."""
    name, _, given = spec.partition(":")
    words = [word for word in given.split(",") if word and word != "tiny"]
    config = load_config(f"{name}:{','.join([*words, 'tiny'])}")
    if "init.weights" in overrides:  # they say what size the model has
        config.model.update({key: None for key in SIZES if key in config.model})
    apply_overrides(config, [*STEPS.items(), *overrides.items()])
    source = config.data.source if config.data.source != "auto" else "python_docs"
    if source != IMAGES:
        files = {split: str(few(source, split, folder)) for split in RECORDS}
        changes = {"files": json.dumps(files), "source": "jsonl", "record": "none"}
        changes |= {"hold_out": "none", "hold_out_by": "none", "columns": "none"}
        apply_overrides(config, [(f"data.{key}", text) for key, text in changes.items()])
    return to_dict(config)


def few(source: str, split: str, folder: Path) -> Path:
    """Returns the path of some records of a source that needs no files, evenly spread over it and
    written once."""
    path = folder / f"{source}-{split}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        whole = open_split({"source": source, "files": {}}, split)
        count = min(RECORDS[split], len(whole))
        rows = (whole[index * len(whole) // count] for index in range(count))
        write_atomically(path, "".join(f"{json.dumps(row)}\n" for row in rows))
    return path
