"""Beam search for the best few continuations of each row.

Scores, ties and the three ways of stopping early are those of transformers' vectorized search
(`_beam_search` in its generation/utils.py), so that the tokens are the same.

Dimensions: B rows, K beams, M chosen beams, W columns of history, V vocabulary.
"""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp

from fmjax.decoding.logits import Number, Place, token_mask
from fmjax.decoding.settings import Generation

BLOCK = 128  # scores per block in `top_k`
NEVER = -1e9  # score of forbidden choices: finite, as in the reference, so that sums remain ordered


@flax.struct.dataclass
class Beams:
    """The running beams, the best first, and the best finished ones."""

    running: jax.Array  # int32 [B,K,W], histories
    log_probs: jax.Array  # fp32 [B,K], summed, of running beams
    finished: jax.Array  # int32 [B,K,W], histories
    scores: jax.Array  # fp32 [B,K], of finished beams: log-probability / length ** length_penalty
    lengths: jax.Array  # int32 [B,K], new tokens of finished beams
    filled: jax.Array  # bool [B,K], whether this place has a finished beam
    improvable: jax.Array  # bool [B], whether a running beam may still beat a finished one
    stuck: jax.Array  # bool [B], whether every candidate has ended


def start_beams(history_BW: jax.Array, alive_B: jax.Array, beams: int) -> Beams:
    """Returns K equal beams per row; initially, only the first may be continued.

    Rows that are not alive are done.
    """
    rows = history_BW.shape[0]
    history = jnp.repeat(history_BW[:, None], beams, axis=1)
    first = jnp.broadcast_to(jnp.arange(beams)[None] == 0, (rows, beams))
    return Beams(
        running=history,
        log_probs=jnp.where(first, 0.0, NEVER),
        finished=history,
        scores=jnp.full((rows, beams), NEVER),
        lengths=jnp.zeros((rows, beams), jnp.int32),
        filled=jnp.broadcast_to(~alive_B[:, None], (rows, beams)),
        improvable=alive_B,
        stuck=jnp.zeros(rows, bool),
    )


def take(array: jax.Array, chosen_BM: jax.Array) -> jax.Array:
    """Returns the chosen beams [B,M,...] of an array [B,K,...]."""
    indices = chosen_BM.reshape(chosen_BM.shape + (1,) * (array.ndim - 2))
    return jnp.take_along_axis(array, indices, axis=1)


def top_k(scores_BKV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Equivalent of `jax.lax.top_k` of [B,KV]: each row's largest scores and indices [B,count].

    Only searches the blocks with the largest maxima: maxima are cheap, and any equal score
    elsewhere comes after `count` others. Rows are neither flattened nor padded: the head may have
    left the vocabulary in front in memory, and either would rewrite all scores in another order.
    """
    rows, beams, size = scores_BKV.shape
    whole, blocks = size // BLOCK, -(-size // BLOCK)
    if beams * blocks <= count:
        values, indices = jax.lax.top_k(scores_BKV.reshape(rows, -1), count)
        return values, indices
    full = scores_BKV[:, :, : whole * BLOCK].reshape(rows, beams, whole, BLOCK).max(axis=3)
    rest = scores_BKV[:, :, whole * BLOCK :]
    maxima = jnp.concatenate([full, rest.max(axis=2, keepdims=True)] if rest.size else [full], 2)
    chosen = jnp.sort(jax.lax.top_k(maxima.reshape(rows, -1), count)[1], axis=1)[:, :, None]
    of, tokens = chosen // blocks, chosen % blocks * BLOCK + jnp.arange(BLOCK)[None, None]
    found = scores_BKV[jnp.arange(rows)[:, None, None], of, jnp.minimum(tokens, size - 1)]
    found = jnp.where(tokens < size, found, -jnp.inf).reshape(rows, -1)
    values, at = jax.lax.top_k(found, count)
    return values, jnp.take_along_axis((of * size + tokens).reshape(rows, -1), at, axis=1)


def advance(
    beams: Beams, log_probs_BKV: jax.Array, place: Place, settings: Generation
) -> tuple[Beams, jax.Array]:
    """Returns the beams with one more token, and the parent of each running one: int32 [B,K]."""
    rows, count, size = log_probs_BKV.shape
    # Enough candidates that K keep running even if every beam ends with each of the ending tokens.
    candidates = min(max(2, 1 + len(settings.eos_token_id)) * count, count * size)
    log_probs, flat = top_k(log_probs_BKV + beams.log_probs[:, :, None], candidates)
    parents, tokens = flat // size, (flat % size).astype(jnp.int32)
    write = jax.lax.dynamic_update_slice
    history = write(take(beams.running, parents), tokens[:, :, None], (0, 0, place.column))
    length = jnp.asarray(place.generated + 1)
    ends = jnp.asarray(token_mask(settings.eos_token_id, size)[0])[tokens] | (length == place.most)

    running, going = jax.lax.top_k(log_probs + ends * NEVER, count)

    # Only the first K candidates may finish; the others keep running.
    finishing = ends & (jnp.arange(candidates) < count)[None]
    closed = ~beams.improvable
    if settings.early_stopping is True:
        closed |= beams.filled.all(axis=1)
    scores = log_probs / length.astype(jnp.float32) ** settings.length_penalty
    scores = scores + closed[:, None] * NEVER + ~finishing * NEVER
    scores, best = jax.lax.top_k(jnp.concatenate([beams.scores, scores], axis=1), count)

    def join(old: jax.Array, new: jax.Array) -> jax.Array:
        return take(jnp.concatenate([old, new], axis=1), best)

    filled = join(beams.filled, finishing)
    lengths = join(beams.lengths, jnp.broadcast_to(length.astype(jnp.int32), (rows, candidates)))
    possible = may_improve(running, scores, filled, length, place, settings)
    after = Beams(
        running=take(history, going),
        log_probs=running,
        finished=join(beams.finished, history),
        scores=scores,
        lengths=lengths,
        filled=filled,
        improvable=beams.improvable & possible,
        stuck=ends.all(axis=1),
    )
    return after, take(parents, going)


def may_improve(
    log_probs_BK: jax.Array,
    scores_BK: jax.Array,
    filled_BK: jax.Array,
    length: Number,
    place: Place,
    settings: Generation,
) -> jax.Array:
    """Returns bool [B]: whether the best running beam may end better than the worst finished one.

    Its score is computed as if it ended here or, with early_stopping="never" and longer beams
    favored, at the maximum length.
    """
    longest = settings.early_stopping == "never" and settings.length_penalty > 0
    at = jnp.asarray(place.most if longest else length, jnp.float32)
    possible = log_probs_BK[:, :1] / at**settings.length_penalty
    worst = jnp.where(filled_BK, scores_BK.min(axis=1, keepdims=True), NEVER)
    return (possible > worst).any(axis=1)


def unfinished(beams: Beams, settings: Generation) -> jax.Array:
    """Returns bool []: whether any row can still improve."""
    going = beams.improvable.any() & ~beams.stuck.all()
    return going & ~beams.filled.all() if settings.early_stopping is True else going
