"""The peer's input of BERT pretraining, as transformers' run_mlm.py builds it. Runs only in the
peer's process.
"""

from __future__ import annotations

import importlib.util
import json
import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from fmjax.bench.workloads import Result


def feed(folder: Path, rows: int, length: int, count: int) -> Result:
    """Returns the seconds and tokens for preparing the texts in a folder and for feeding `count`
    batches of them.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    texts = [
        json.loads(line)["text"]
        for line in (folder / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    held = importlib.util.find_spec("datasets") is not None

    def tokenized(batch: Any) -> Any:
        return tokenizer(batch["text"], return_special_tokens_mask=True, truncation=False)

    def cut(batch: Any) -> Any:
        joined = {name: list(chain.from_iterable(batch[name])) for name in batch}
        whole = len(joined["input_ids"]) // length * length
        return {
            name: [values[at : at + length] for at in range(0, whole, length)]
            for name, values in joined.items()
        }

    begun = time.perf_counter()
    if held:
        from datasets import Dataset

        options = {"batched": True, "load_from_cache_file": False}
        data: Any = Dataset.from_dict({"text": texts}).map(
            tokenized, remove_columns=["text"], **options
        )
        data = data.map(cut, **options)
    else:
        chunks = [
            cut(tokenized({"text": texts[at : at + 1000]})) for at in range(0, len(texts), 1000)
        ]
        data = [
            {name: chunk[name][index] for name in chunk}
            for chunk in chunks
            for index in range(len(chunk["input_ids"]))
        ]
    prepared = time.perf_counter()
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
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
        "name": "datasets + DataCollator" if held else "lists without datasets + DataCollator",
        "prepare_seconds": prepared - begun,
        "prepare_tokens": len(data) * length,
        "feed_seconds": done - prepared,
        "feed_tokens": tokens,
    }
