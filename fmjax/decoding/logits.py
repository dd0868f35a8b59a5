"""The scores of next tokens, changed as the settings of generation ask. Letters: N rows, W columns of history, V vocabulary.

`history [N,W]` holds each row's tokens up to a column, and NONE where there is none: before a shorter prompt, and ahead.
The order is the reference's, and so are the formulae, but padding never counts as a token.
"""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from fmjax.decoding.settings import Generation

NONE = -1


@flax.struct.dataclass
class Place:
    """Where generation stands. All are numbers that may change without compiling anew."""

    column: Any  # of the history, that the next token goes to
    made: Any  # tokens made so far
    most: Any  # to be made
    least: Any  # to be made before one may end the row
    width: Any  # columns of the prompt, as it was given


def process(scores_NV: jax.Array, history_NW: jax.Array, place: Place, settings: Generation) -> jax.Array:
    """Returns the scores (logits, or with beams their log-probabilities) with what may not come at -inf."""
    size, s = scores_NV.shape[1], settings
    if s.repetition_penalty != 1:
        again = marked(history_NW, size)
        penalised = jnp.where(scores_NV < 0, scores_NV * s.repetition_penalty, scores_NV / s.repetition_penalty)
        scores_NV = jnp.where(again, penalised, scores_NV)
    if s.no_repeat_ngram_size:
        scores_NV = jnp.where(repeating(history_NW, place.column, s.no_repeat_ngram_size, size), -jnp.inf, scores_NV)
    for word in s.bad_words_ids:
        if len(word) > 1 or word[0] not in s.eos_token_id:
            begun = ends_with(history_NW, place.column, word[:-1])
            scores_NV = jnp.where(begun[:, None] & among(word[-1:], size), -jnp.inf, scores_NV)
    scores_NV = jnp.where((place.made < place.least) & among(s.eos_token_id, size), -jnp.inf, scores_NV)
    if s.forced_bos_token_id is not None:
        first = place.width + place.made == 1
        scores_NV = jnp.where(first, forced((s.forced_bos_token_id,), size), scores_NV)
    if s.forced_eos_token_id:
        scores_NV = jnp.where(place.made == place.most - 1, forced(s.forced_eos_token_id, size), scores_NV)
    if s.suppress_tokens:
        scores_NV = jnp.where(among(s.suppress_tokens, size), -jnp.inf, scores_NV)
    if s.begin_suppress_tokens:
        # A token that is forced is no beginning.
        begin = 0 if s.forced_bos_token_id is None else jnp.where(place.width == 1, 1, 0)
        scores_NV = jnp.where((place.made == begin) & among(s.begin_suppress_tokens, size), -jnp.inf, scores_NV)
    if s.do_sample:
        scores_NV = filtered(scores_NV, s)
    return jax.nn.log_softmax(scores_NV) if s.renormalize_logits else scores_NV


def filtered(scores_NV: jax.Array, settings: Generation) -> jax.Array:
    """Returns the scores that are sampled from: divided by the temperature, the unlikely ones at -inf.

    Kept are the `top_k` highest; of these the fewest whose probabilities sum up to `top_p` (Holtzman et al. 2020,
    arXiv:1904.09751); of these those at least `min_p` times as likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082).
    """
    scores_NV = scores_NV / settings.temperature
    if 0 < settings.top_k < scores_NV.shape[1]:
        least = jax.lax.top_k(scores_NV, settings.top_k)[0][:, -1:]
        scores_NV = jnp.where(scores_NV < least, -jnp.inf, scores_NV)
    if settings.top_p < 1:
        rising = jnp.sort(scores_NV, axis=-1)
        below = jnp.cumsum(jax.nn.softmax(rising), axis=-1) <= 1 - settings.top_p
        least = jnp.where(below.at[:, -1].set(False), jnp.inf, rising).min(axis=-1, keepdims=True)
        scores_NV = jnp.where(scores_NV < least, -jnp.inf, scores_NV)
    if settings.min_p is not None:
        likely = jax.nn.softmax(scores_NV)
        scores_NV = jnp.where(likely < settings.min_p * likely.max(axis=-1, keepdims=True), -jnp.inf, scores_NV)
    return scores_NV


def among(ids: tuple[int, ...], size: int) -> np.ndarray:
    """Returns bool [1,V]: which tokens these are."""
    return np.isin(np.arange(size), ids)[None]


def forced(ids: tuple[int, ...], size: int) -> np.ndarray:
    """Returns float32 [1,V]: 0 for these tokens, -inf for all others."""
    return np.where(among(ids, size), 0, -np.inf).astype(np.float32)


def marked(ids_NM: jax.Array, size: int) -> jax.Array:
    """Returns bool [N,V]: which tokens stand in a row; NONE is none."""
    ids_NM = jnp.where(ids_NM == NONE, size, ids_NM)  # a negative index would count from the end
    return jax.vmap(lambda row: jnp.zeros(size, bool).at[row].set(True, mode="drop"))(ids_NM)


def last(history_NW: jax.Array, column: jax.Array, count: int) -> jax.Array:
    """Returns the `count` tokens before a column [N,count], NONE where there are not so many."""
    padded = jnp.pad(history_NW, ((0, 0), (count, 0)), constant_values=NONE)
    return jax.lax.dynamic_slice_in_dim(padded, column, count, axis=1)


def ends_with(history_NW: jax.Array, column: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """Returns bool [N]: whether these tokens stand before a column."""
    return (last(history_NW, column, len(ids)) == np.array(ids, np.int32)[None]).all(axis=1)


def repeating(history_NW: jax.Array, column: jax.Array, size: int, vocabulary: int) -> jax.Array:
    """Returns bool [N,V]: the tokens that would repeat `size` tokens in a row."""
    before, windows = last(history_NW, column, size - 1), history_NW.shape[1] - size + 1
    if windows < 1:
        return jnp.zeros((history_NW.shape[0], vocabulary), bool)
    same = jnp.broadcast_to((before != NONE).all(axis=1, keepdims=True), (history_NW.shape[0], windows))
    for at in range(size - 1):
        same &= history_NW[:, at : at + windows] == before[:, at, None]
    return marked(jnp.where(same, history_NW[:, size - 1 :], NONE), vocabulary)
