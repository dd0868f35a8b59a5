"""Processing of next-token scores according to the generation settings.

`history [N,W]` has each row's tokens up to a column, and NONE at padding and in future columns.
Order and formulas are those of transformers' generation/logits_process.py, except that padding
never counts as a token.

Dimensions: N rows, W columns of history, M tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import flax
import jax
import jax.numpy as jnp
import numpy as np

from fmjax.decoding.settings import Generation

NONE = -1
Number: TypeAlias = jax.Array | int


@flax.struct.dataclass
class Place:
    """The position of generation, as numbers that may change without recompilation."""

    column: Number  # of the history, for the next token
    generated: Number  # new tokens so far
    most: Number  # new tokens at the end
    least: Number  # minimum new tokens before a row may end
    prompt_length: Number  # columns of the given prompt

    def next(self) -> Place:
        """Returns the place one token later."""
        return dataclasses.replace(self, column=self.column + 1, generated=self.generated + 1)


def process(
    scores_NV: jax.Array, history_NW: jax.Array, place: Place, settings: Generation
) -> jax.Array:
    """Returns the scores [N,V], with -inf for forbidden tokens.

    Scores are fp32 logits or, for beams, log-probabilities.
    """
    size, s = scores_NV.shape[1], settings
    if s.repetition_penalty != 1:
        penalty = s.repetition_penalty
        penalized = jnp.where(scores_NV < 0, scores_NV * penalty, scores_NV / penalty)
        scores_NV = jnp.where(present_tokens(history_NW, size), penalized, scores_NV)
    if s.no_repeat_ngram_size:
        repeating = ngram_endings(history_NW, place.column, s.no_repeat_ngram_size, size)
        scores_NV = jnp.where(repeating, -jnp.inf, scores_NV)
    for word in s.bad_words_ids:
        if len(word) > 1 or word[0] not in s.eos_token_id:
            begun = ends_with(history_NW, place.column, word[:-1])
            last = token_mask(word[-1:], size)
            scores_NV = jnp.where(begun[:, None] & last, -jnp.inf, scores_NV)
    too_early = place.generated < place.least
    scores_NV = jnp.where(too_early & token_mask(s.eos_token_id, size), -jnp.inf, scores_NV)
    if s.forced_bos_token_id is not None:
        second = place.prompt_length + place.generated == 1
        scores_NV = jnp.where(second, forcing((s.forced_bos_token_id,), size), scores_NV)
    if s.forced_eos_token_id:
        final = place.generated == place.most - 1
        scores_NV = jnp.where(final, forcing(s.forced_eos_token_id, size), scores_NV)
    if s.suppress_tokens:
        scores_NV = jnp.where(token_mask(s.suppress_tokens, size), -jnp.inf, scores_NV)
    if s.begin_suppress_tokens:
        # A forced token does not count as the first.
        begin = 0 if s.forced_bos_token_id is None else jnp.where(place.prompt_length == 1, 1, 0)
        begins = place.generated == begin
        scores_NV = jnp.where(
            begins & token_mask(s.begin_suppress_tokens, size), -jnp.inf, scores_NV
        )
    if s.do_sample:
        scores_NV = filter_unlikely(scores_NV, s)
    return jax.nn.log_softmax(scores_NV) if s.renormalize_logits else scores_NV


def filter_unlikely(scores_NV: jax.Array, settings: Generation) -> jax.Array:
    """Returns the scores to sample from: divided by the temperature, with -inf for unlikely tokens.

    Keeps the `top_k` highest; of these the fewest whose probabilities sum up to `top_p` (Holtzman
    et al. 2020, arXiv:1904.09751); of these those at least `min_p` times as likely as the most
    likely (Nguyen et al. 2024, arXiv:2407.01082).
    """
    scores_NV = scores_NV / settings.temperature
    if 0 < settings.top_k < scores_NV.shape[1]:
        least = jax.lax.top_k(scores_NV, settings.top_k)[0][:, -1:]
        scores_NV = jnp.where(scores_NV < least, -jnp.inf, scores_NV)
    if settings.top_p < 1:
        rising = jnp.sort(scores_NV, axis=-1)
        below = jnp.cumsum(jax.nn.softmax(rising), axis=-1) <= 1 - settings.top_p
        kept = jnp.where(below.at[:, -1].set(False), jnp.inf, rising)
        scores_NV = jnp.where(scores_NV < kept.min(axis=-1, keepdims=True), -jnp.inf, scores_NV)
    if settings.min_p is not None:
        probs = jax.nn.softmax(scores_NV)
        least = settings.min_p * probs.max(axis=-1, keepdims=True)
        scores_NV = jnp.where(probs < least, -jnp.inf, scores_NV)
    return scores_NV


def token_mask(ids: tuple[int, ...], size: int) -> np.ndarray:
    """Returns bool [1,V]: True at these ids."""
    return np.isin(np.arange(size), ids)[None]


def forcing(ids: tuple[int, ...], size: int) -> np.ndarray:
    """Returns float32 [1,V]: 0 for these ids and -inf for all others."""
    return np.where(token_mask(ids, size), 0, -np.inf).astype(np.float32)


def present_tokens(ids_NM: jax.Array, size: int) -> jax.Array:
    """Returns bool [N,V]: the tokens that occur in each row; NONE is not one."""
    ids_NM = jnp.where(ids_NM == NONE, size, ids_NM)  # a negative index would count from the end

    def mark(ids_M: jax.Array) -> jax.Array:
        return jnp.zeros(size, bool).at[ids_M].set(True, mode="drop")

    return jax.vmap(mark)(ids_NM)


def last_tokens(history_NW: jax.Array, column: Number, count: int) -> jax.Array:
    """Returns the `count` tokens before a column [N,count], with NONE if there are fewer."""
    padded = jnp.pad(history_NW, ((0, 0), (count, 0)), constant_values=NONE)
    return jax.lax.dynamic_slice_in_dim(padded, column, count, axis=1)


def ends_with(history_NW: jax.Array, column: Number, ids: tuple[int, ...]) -> jax.Array:
    """Returns bool [N]: whether these ids come right before a column."""
    return (last_tokens(history_NW, column, len(ids)) == np.array(ids, np.int32)[None]).all(axis=1)


def ngram_endings(history_NW: jax.Array, column: Number, length: int, size: int) -> jax.Array:
    """Returns bool [N,V]: the tokens that would repeat an n-gram of this length."""
    rows, windows = history_NW.shape[0], history_NW.shape[1] - length + 1
    if windows < 1:
        return jnp.zeros((rows, size), bool)
    before = last_tokens(history_NW, column, length - 1)
    same = jnp.broadcast_to((before != NONE).all(axis=1, keepdims=True), (rows, windows))
    for at in range(length - 1):
        same &= history_NW[:, at : at + windows] == before[:, at, None]
    return present_tokens(jnp.where(same, history_NW[:, length - 1 :], NONE), size)
