"""Random changes to a tokenized text that preserve its meaning, drawn each time it is seen. Special
tokens do not change.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fmjax.data.tokenizers.tokenizer import Tokenizer

Augmentation = Callable[
    [np.ndarray, np.random.Generator], np.ndarray
]  # maps int32 ids [L] to ids [L]


def drop_tokens(
    ids: np.ndarray, rng: np.random.Generator, *, tokenizer: Tokenizer, share: float
) -> np.ndarray:
    """Returns ids, each replaced by the unknown token with probability `share` (word dropout, Iyyer
    et al. 2015).
    """
    hit = (rng.random(ids.size) < share) & ~tokenizer.special_mask[ids]
    return np.where(hit, tokenizer.unk_id, ids).astype(np.int32)


def mask_span(
    ids: np.ndarray, rng: np.random.Generator, *, tokenizer: Tokenizer, share: float
) -> np.ndarray:
    """Returns ids with one span replaced by mask tokens. The span has the fraction `share` of the
    tokens, but at least one token if the text has two.

    In a pair of texts the span may reach from the end of the first to the beginning of the second.
    """
    places = np.flatnonzero(~tokenizer.special_mask[ids])
    if places.size < 2:
        return ids
    length = max(1, round(share * places.size))
    begin = int(rng.integers(places.size - length + 1))
    masked = ids.copy()
    masked[places[begin : begin + length]] = tokenizer.mask_id
    return masked
