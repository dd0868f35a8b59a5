"""Special tokens around texts, many texts at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fmjax.data.ragged import ragged, spread


class Part(NamedTuple):
    """A part of an assembled row: special tokens, or the first or second text (`text` 0 or 1), and
    its token type."""

    ids: tuple[int, ...]
    text: int | None
    type_id: int


class Assembled(NamedTuple):
    """Rows of special tokens and texts, one row after the other: their ids and token types, int32
    [T], and the size of each, int64 [N]."""

    ids: np.ndarray
    types: np.ndarray
    sizes: np.ndarray


def assembled(layout: Sequence[Part], texts: Sequence[Sequence[np.ndarray]]) -> Assembled:
    """Returns rows in a layout from the ids of their texts: the first of each, and the second."""
    sides = [ragged(side) for side in texts]
    count = len(texts[0])
    each = [
        np.full(count, len(part.ids)) if part.text is None else sides[part.text].sizes
        for part in layout
    ]
    sizes = np.asarray(np.sum(each, axis=0, dtype=np.int64))
    ids, types = np.zeros((2, int(sizes.sum())), np.int32)
    begins = np.cumsum(sizes) - sizes
    for part, own in zip(layout, each, strict=True):
        places = spread(begins, own)
        inside = np.tile(part.ids, count) if part.text is None else sides[part.text].values
        ids[places], types[places] = inside, part.type_id
        begins = begins + own
    return Assembled(ids, types, sizes)
