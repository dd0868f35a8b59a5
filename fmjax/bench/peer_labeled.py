"""The peer of `labeled.py`: `PEER_PYTHON fmjax/bench/peer_labeled.py FILE TOKENIZER`, with an
interpreter that has torch, transformers and `datasets`."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from transformers import AutoTokenizer, DataCollatorWithPadding

ROWS, LENGTH, BATCHES = 32, 64, 2000


def peer(file: str, tokenizer: str) -> tuple[float, float]:
    """Returns the seconds for preparing the data, and for feeding BATCHES batches."""
    from datasets import Dataset

    begun = time.perf_counter()
    reader = AutoTokenizer.from_pretrained(tokenizer)
    data: Any = Dataset.from_json(file).class_encode_column("label")
    data = data.map(
        lambda batch: reader(batch["text"], truncation=True, max_length=LENGTH),
        batched=True,
        remove_columns=["text"],
    )
    loader = torch.utils.data.DataLoader(
        data, batch_size=ROWS, shuffle=True, collate_fn=DataCollatorWithPadding(reader)
    )
    batches = iter(loader)
    next(batches)
    prepared = time.perf_counter()
    for _ in range(BATCHES):
        next(batches)
    return prepared - begun, time.perf_counter() - prepared


def main() -> None:
    prepare, feed = peer(*sys.argv[1:3])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"first batch after {prepare:.1f} s, {BATCHES / feed:,.0f} batches of {ROWS} per second, "
        f"peak RSS {most:,.0f} MiB"
    )


if __name__ == "__main__":
    main()
