"""Token arrays that tasks share: a tokenised corpus, and rows padded to one length."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from fmjax.data.sources import Source
from fmjax.data.tokenizers import Tokenizer
from fmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Corpus:
    """`tokens [T]` of all documents without special tokens; document i ends before `bounds[i]`."""

    tokens: np.ndarray
    bounds: np.ndarray

    def pieces(self, most: int) -> np.ndarray:
        """Returns [pieces, 2]: begin and end of consecutive pieces of at most `most` tokens, none crossing a document.

        Raises UserError if `most` leaves no room for a token.
        """
        if most < 1:
            raise UserError("data.max_length leaves no room for a token beside the special ones; raise it")
        begins = np.concatenate([[0], self.bounds[:-1]])
        spans = [
            np.stack([starts := np.arange(begin, end, most), np.minimum(starts + most, end)], axis=1)
            for begin, end in zip(begins.tolist(), self.bounds.tolist(), strict=True)
        ]
        return np.concatenate(spans) if spans else np.zeros((0, 2), np.int64)


def texts(source: Source, column: str, begin: int = 0, end: int | None = None) -> Iterator[str]:
    """Yields a column of the records from `begin` to before `end`.

    Raises UserError, naming the record, for a value that is not a string.
    """
    for index in range(len(source))[begin:end]:
        text = source[index][column]
        if not isinstance(text, str):
            raise UserError(f'{source.where(index)}: column "{column}" holds {text!r:.60}, not text; correct the record')
        yield text


def tokenise(source: Source, column: str, tokenizer: Tokenizer, chunk: int = 4096) -> Corpus:
    """Tokenises a column of every record, a chunk of records at a time.

    Raises UserError if a record's text is not a string or no record has a token.
    """
    tokens: list[np.ndarray] = []
    lengths: list[int] = []
    for begin in range(0, len(source), chunk):
        ids = tokenizer.encode_batch(list(texts(source, column, begin, begin + chunk)))
        tokens.extend(ids)
        lengths.extend(map(len, ids))
    bounds = np.cumsum(np.array(lengths, np.int64))
    if not len(bounds) or not bounds[-1]:
        raise UserError(f'column "{column}" has no text in any of {len(source)} records; give a data set with text')
    return Corpus(np.concatenate(tokens).astype(np.int32), bounds)


def pad_rows(rows: Sequence[tuple[np.ndarray, np.ndarray]], pad_id: int, length: int = 0) -> dict[str, np.ndarray]:
    """Returns a batch [rows, length] from (ids, token types) of several lengths; by default that of the longest."""
    length = length or max(ids.size for ids, _ in rows)
    batch = {
        "input_ids": np.full((len(rows), length), pad_id, np.int32),
        "token_type_ids": np.zeros((len(rows), length), np.int32),
        "attention_mask": np.zeros((len(rows), length), np.int32),
    }
    for row, (ids, types) in enumerate(rows):
        batch["input_ids"][row, : ids.size] = ids
        batch["token_type_ids"][row, : ids.size] = types
        batch["attention_mask"][row, : ids.size] = 1
    return batch
