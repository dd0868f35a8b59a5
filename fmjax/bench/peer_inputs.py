"""The peer's input of BERT's pretraining and fine-tuning, as transformers' run_mlm.py and
run_glue.py build it. Runs only in the peer's process.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
)

from fmjax.bench.workloads import Result


def feed(folder: Path, name: str, rows: int, length: int, count: int) -> Result:
    """Returns the seconds and tokens for preparing the texts in a folder for a task, and for
    feeding `count` batches of them.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    held = importlib.util.find_spec("datasets") is not None
    begun = time.perf_counter()
    file = folder / f"{name}.jsonl"

    def tokenized(batch: Any) -> Any:
        if name == "classify":
            labels = ["abcd".index(label) for label in batch["label"]]
            found = tokenizer(batch["text"], truncation=True, max_length=length)
            return {**found, "label": labels}
        return tokenizer(batch["text"], return_special_tokens_mask=True, truncation=False)

    def cut(batch: Any) -> Any:
        joined = {key: list(chain.from_iterable(batch[key])) for key in batch}
        whole = len(joined["input_ids"]) // length * length
        return {
            key: [values[at : at + length] for at in range(0, whole, length)]
            for key, values in joined.items()
        }

    steps = [tokenized] if name == "classify" else [tokenized, cut]
    data = mapped(file, steps) if held else listed(file, steps)
    prepared = time.perf_counter()
    collate: Any = (
        DataCollatorWithPadding(tokenizer)
        if name == "classify"
        else DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    )
    loader = torch.utils.data.DataLoader(
        data, batch_size=rows, shuffle=True, collate_fn=collate, drop_last=True
    )
    tokens, fed = 0, 0
    while fed < count:
        for batch in loader:
            tokens, fed = tokens + int(batch["attention_mask"].sum()), fed + 1
            if fed == count:
                break
    done = time.perf_counter()
    return {
        "side": "datasets + DataCollator" if held else "lists without datasets + DataCollator",
        "prepare_seconds": prepared - begun,
        "prepare_tokens": sum(map(len, data["input_ids"])) if held else total(data),
        "feed_seconds": done - prepared,
        "feed_tokens": tokens,
    }


def mapped(file: Path, steps: Any) -> Any:
    """Returns a data set after steps on batches of its records."""
    from datasets import Dataset

    with tempfile.TemporaryDirectory() as cache:
        data: Any = Dataset.from_json(str(file), cache_dir=cache, keep_in_memory=True)
    for number, step in enumerate(steps):
        first = {"remove_columns": data.column_names} if number == 0 else {}
        options = {"batched": True, "load_from_cache_file": False, "new_fingerprint": str(number)}
        data = data.map(step, **options, **first)
    return data


def listed(file: Path, steps: Any) -> Any:
    """Returns the same as a list of rows."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = []
    for at in range(0, len(records), 1000):
        part: Any = {key: [record[key] for record in records[at : at + 1000]] for key in records[0]}
        for step in steps:
            part = step(part)
        rows += [{key: part[key][index] for key in part} for index in range(len(part["input_ids"]))]
    return rows


def total(rows: Any) -> int:
    return sum(len(row["input_ids"]) for row in rows)
