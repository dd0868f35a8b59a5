"""Token ids in a record, beside its text, as `scripts/prepare_data.py` stored them before it wrote
token stores:

`ids`, and the `tokenizer` that produced them.
"""

from __future__ import annotations

import base64

import numpy as np

from fmjax.contracts import Record, Source
from fmjax.errors import RecordError

COLUMNS = ("ids", "tokenizer")


def unpack(packed: str) -> np.ndarray:
    """Returns ids, int32 [N]. Raises ValueError if they are malformed."""
    return np.frombuffer(base64.b64decode(packed, validate=True), "<i4").astype(np.int32)


def are_of(source: Source, column: str, sha256: str) -> bool:
    """Returns whether the records have ids from this tokenizer, judged by the first one."""
    if column != "text" or not set(COLUMNS) <= set(source.columns):
        return False
    return bool(source[0]["tokenizer"] == sha256[:16])


def read(source: Source, index: int, found: Record, sha256: str) -> np.ndarray:
    """Returns the ids [N] of a record.

    Raises UserError, naming it, if they are damaged or from another tokenizer.
    """
    if found["tokenizer"] != sha256[:16]:
        raise RecordError(
            source.where(index),
            "its ids are from another tokenizer than those before it; prepare all files with the "
            "same one",
            index,
        )
    try:
        return unpack(found["ids"])
    except (TypeError, ValueError) as error:
        raise RecordError(
            source.where(index), f"its ids are damaged ({error}); prepare the data again", index
        ) from error
