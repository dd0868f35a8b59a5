"""Texts: a tokenizer turns them into token ids."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from fmjax import contracts
from fmjax.contracts import Column, Config, HostBatch, Source, Value
from fmjax.data.records import values_of
from fmjax.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from fmjax.errors import RecordError

MULTIPLE = 32  # the lengths of batches for prediction are multiples of it


@dataclasses.dataclass(frozen=True)
class Processor(contracts.Processor):
    """A tokenizer, for all columns of texts."""

    kind: ClassVar[str] = "text"
    what: ClassVar[str] = "tokenizer"
    reads: ClassVar[str] = "texts"
    file: ClassVar[str] = "tokenizer.json"
    unit: ClassVar[str] = "tokens"
    model_settings: ClassVar[tuple[str, ...]] = ("vocab_size",)
    at_root: ClassVar[bool] = True

    tokenizer: Tokenizer

    @classmethod
    def named(cls, data: Config) -> Self | None:
        """Returns the tokenizer that `data.tokenizer` names. Raises UserError if there is none."""
        return cls(load_tokenizer(data["tokenizer"])) if data.get("tokenizer") else None

    @classmethod
    def fit(cls, columns: Sequence[Column], settings: Config, added: Sequence[Value] = ()) -> Self:
        """Returns a tokenizer trained on the texts of the columns, one column after the other, and
        on the added texts, once per record.

        Raises RecordError for a value that is not text.
        """

        def every() -> Iterator[str]:
            for column in columns:
                yield from texts(column.source, column.name)
            for value in added:
                yield from itertools.repeat(value, max(len(column.source) for column in columns))

        kind, size = settings["tokenizer_kind"], settings["vocab_size"]
        return cls(train_tokenizer(every(), kind, size, lowercase=settings.get("lowercase", True)))

    @classmethod
    def announcement(cls, settings: Config) -> str:
        kind, size = settings["tokenizer_kind"], settings["vocab_size"]
        return f"tokenizer: training {kind} with {size} pieces on the training data"

    @classmethod
    def restore(cls, folder: Path) -> Self:
        return cls(load_tokenizer(folder))

    def save(self, folder: Path) -> None:
        self.tokenizer.save(folder)

    @property
    def sha256(self) -> str:
        return self.tokenizer.sha256

    def load(self, value: Value, where: str) -> str:
        """Returns a text; several strings (words, endings) as one text."""
        text = joined(value)
        if text is None:
            raise RecordError(where, f"holds {value!r:.60}, not text; correct the record")
        return text

    def sizes(self) -> dict[str, int]:
        return {"vocab_size": self.tokenizer.vocab_size}

    def digest(self, value: Value) -> bytes:
        """Returns the text case-folded, with single spaces; empty for other values."""
        return " ".join((joined(value) or "").lower().split()).encode("utf-8", "surrogatepass")

    def pad(self, batch: HostBatch, sized: Sequence[str], most: int) -> dict[str, np.ndarray]:
        """Returns a batch whose `sized` arrays have lengths that are multiples of 32: ids are
        padded with the padding id, other arrays with 0.
        """
        padded = dict(batch)
        for name in sized:
            if name not in batch:
                continue
            length = batch[name].shape[-1]
            whole = -(-length // MULTIPLE) * MULTIPLE
            more = max((min(whole, most) if most else whole) - length, 0)
            places = ((0, 0),) * (batch[name].ndim - 1) + ((0, more),)
            fill = self.tokenizer.fill_id if name == "input_ids" else 0
            padded[name] = np.pad(batch[name], places, constant_values=fill)
        return padded


def joined(value: Value) -> str | None:
    """Returns a string unchanged, and several strings joined by spaces; None for anything else."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return " ".join(value)
    return value if isinstance(value, str) else None


def texts(source: Source, column: str, begin: int = 0, end: int | None = None) -> Iterator[str]:
    """Yields a column of the records from `begin` to before `end`; several strings (words, endings)
    as one text.

    Raises RecordError for a value that is neither a string nor several.
    """
    indices = range(len(source))[begin:end]
    for index, value in zip(indices, values_of(source, column, indices), strict=True):
        text = joined(value)
        if text is None:
            problem = f'column "{column}" holds {value!r:.60}, not text; correct the record'
            raise RecordError(source.where(index), problem, index)
        yield text
