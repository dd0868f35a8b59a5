"""The token store of a prepared corpus (`data/storage/token_store.py`), beside its shards.

Each task writes a store of its documents; the last step puts them into the order of the shards.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fmjax.contracts import Config, Record
from fmjax.data.kinds.encoding import id_type, part_of
from fmjax.data.sources.open import open_source
from fmjax.data.storage import token_store
from fmjax.data.storage.ranged import checksums
from fmjax.data.storage.token_store import Part, TokenStore, Writer
from fmjax.data.tokenizers.tokenizer import load_tokenizer
from fmjax.tasks.corpus import Made

FOLDER = "tokens"  # of the stores of tasks, in the folder of intermediate files
BLOCK = 4096  # documents that are copied at a time


class TaskTokens:
    """Writes the tokens of a task's documents. A killed task writes them again."""

    def __init__(self, work: Path, rank: int, tokenizer: str):
        self.tokenizer = load_tokenizer(tokenizer)
        self.target = task_folder(work, rank)
        part = self.target.with_name(f".{self.target.name}.{os.getpid()}")
        self.writer = Writer(part, id_type(self.tokenizer))

    def add(self, texts: Sequence[str]) -> None:
        """Appends documents. Raises UserError if the disk is full."""
        self.writer.add(part_of(texts, self.tokenizer.encode_batch(texts), self.writer.dtype))

    def close(self) -> int:
        """Completes the store. Returns the number of tokens."""
        self.writer.close({})
        shutil.rmtree(self.target, ignore_errors=True)
        self.writer.folder.rename(self.target)
        return self.writer.tokens

    def abandon(self) -> None:
        """Removes what was written."""
        self.writer.abandon()


def task_folder(work: Path, rank: int) -> Path:
    """Returns the folder of a task's store."""
    return work / FOLDER / f"{rank:05d}"


def place_tokens(work: Path, output: Path, settings: Config, shards: Sequence[Record]) -> None:
    """Writes the store of the shards into the output folder, where training finds it.

    Args:
      work: the folder of intermediate files.
      output: the folder of the shards.
      settings: the settings of the preparation.
      shards: name and `number` of each shard, in order.
    """
    tokenizer = load_tokenizer(settings["tokenizer"]["path"])
    source = open_source("array_record", [str(output / shard["file"]) for shard in shards], "train")

    def fill(writer: Writer) -> Record:
        for part in parts_in_order(work, settings, [shard["number"] for shard in shards]):
            writer.add(part, (writer.documents + len(part.counts)) / len(source))
        # In a bucket, the shards are known by what it says about them.
        files = [output / shard["file"] for shard in shards]
        sums = [{"size": file.stat().st_size} | checksums(file) for file in files]
        return {"bad": [], "column": "text", "tokenizer": tokenizer.sha256, "shards": sums}

    target = output / Made("text", tokenizer).key(source)
    if token_store.read_header(target) is None:
        part = target.with_name(f".{target.name}.part")
        token_store.build(part, target, id_type(tokenizer), fill)


def parts_in_order(work: Path, settings: Config, numbers: Sequence[int]) -> Iterator[Part]:
    """Yields the documents of shards, by the numbers that they had in their tasks, which wrote to
    their shards in turn."""
    for number in numbers:
        rank = number % settings["tasks"]
        own = range(rank, settings["shards"], settings["tasks"])
        store = TokenStore(task_folder(work, rank))
        chosen = np.arange(own.index(number), len(store.ends), len(own))
        for begin in range(0, len(chosen), BLOCK):
            yield documents(store, chosen[begin : begin + BLOCK])


def documents(store: TokenStore, chosen: np.ndarray) -> Part:
    """Returns some documents of a store."""
    ends = store.ends[chosen]
    begins = np.where(chosen > 0, store.ends[chosen - (chosen > 0)], 0)
    rows = [store.read(*span) for span in zip(begins.tolist(), ends.tolist(), strict=True)]
    return Part(np.concatenate(rows), ends - begins, store.sizes[chosen])
