"""Beam search: the best few continuations of each row, side by side. Letters as in `scores.py`; B rows, K beams.

Scores, ties and the three ways of stopping early are those of the reference's vectorised search (`_beam_search` of its
generation/utils.py), so that the tokens are the same.
"""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp

from fmjax.decoding.logits import Place, among
from fmjax.decoding.settings import Generation

BLOCK = 128  # scores that `top_k` takes together
NEVER = -1e9  # the score of what may not be chosen: finite, as in the reference, so that sums of it stay ordered


@flax.struct.dataclass
class Beams:
    """The beams that go on, the best first, and the best that have ended."""

    history: jax.Array  # [B,K,W], of those that go on
    scores: jax.Array  # [B,K], sums of log-probabilities
    ended: jax.Array  # [B,K,W], histories
    ended_scores: jax.Array  # [B,K], divided by length ** length_penalty
    ended_lengths: jax.Array  # [B,K], new tokens
    full: jax.Array  # [B,K], whether this place holds one that has ended
    hopeful: jax.Array  # [B], whether one that goes on could still be better than one that has ended
    stuck: jax.Array  # [B], whether none can go on


def begin(history_BW: jax.Array, alive_B: jax.Array, beams: int) -> Beams:
    """Returns K like beams of each row, of which the first alone may be continued at first. Rows not alive only fill up."""
    rows = history_BW.shape[0]
    history = jnp.repeat(history_BW[:, None], beams, axis=1)
    first = jnp.broadcast_to(jnp.arange(beams)[None] == 0, (rows, beams))
    return Beams(
        history=history,
        scores=jnp.where(first, 0.0, NEVER),
        ended=history,
        ended_scores=jnp.full((rows, beams), NEVER),
        ended_lengths=jnp.zeros((rows, beams), jnp.int32),
        full=jnp.broadcast_to(~alive_B[:, None], (rows, beams)),
        hopeful=alive_B,
        stuck=jnp.zeros(rows, bool),
    )


def pick(array: jax.Array, chosen_BM: jax.Array) -> jax.Array:
    """Returns [B,M,...]: of each row of [B,K,...] those that are chosen."""
    return jnp.take_along_axis(array, chosen_BM.reshape(chosen_BM.shape + (1,) * (array.ndim - 2)), axis=1)


def top_k(scores_BN: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns what `jax.lax.top_k` does, the greatest of each row and their places [B,count], ties in the order of places.

    Looks through the blocks that have the greatest maxima alone: taking maxima is cheap, and whatever else is as great comes
    behind `count` others.
    """
    rows, size = scores_BN.shape
    blocks = -(-size // BLOCK)
    if blocks <= count:
        return jax.lax.top_k(scores_BN, count)
    padded = jnp.pad(scores_BN, ((0, 0), (0, blocks * BLOCK - size)), constant_values=-jnp.inf)
    parts = padded.reshape(rows, blocks, BLOCK)
    chosen = jnp.sort(jax.lax.top_k(parts.max(axis=2), count)[1], axis=1)
    values, at = jax.lax.top_k(pick(parts, chosen).reshape(rows, -1), count)
    return values, jnp.take_along_axis(chosen, at // BLOCK, axis=1) * BLOCK + at % BLOCK


def advance(beams: Beams, log_probs_BKV: jax.Array, place: Place, settings: Generation) -> tuple[Beams, jax.Array]:
    """Returns the beams with one more token, and the parent of each that goes on: int32 [B,K]."""
    rows, count, size = log_probs_BKV.shape
    # Enough candidates that K go on even where every beam ends with each of the ending tokens.
    kept = min(max(2, 1 + len(settings.eos_token_id)) * count, count * size)
    total = (log_probs_BKV + beams.scores[:, :, None]).reshape(rows, count * size)
    scores, flat = top_k(total, kept)
    parents, tokens = flat // size, (flat % size).astype(jnp.int32)
    history = jax.lax.dynamic_update_slice(pick(beams.history, parents), tokens[:, :, None], (0, 0, place.column))
    length = place.made + 1
    ends = jnp.asarray(among(settings.eos_token_id, size)[0])[tokens] | (length == place.most)

    running, going = jax.lax.top_k(scores + ends * NEVER, count)

    # Of the candidates the first K may end; the others are there to go on.
    ending = ends & (jnp.arange(kept) < count)[None]
    closed = ~beams.hopeful | (beams.full.all(axis=1) if settings.early_stopping is True else False)
    final = scores / length.astype(jnp.float32) ** settings.length_penalty + closed[:, None] * NEVER + ~ending * NEVER
    ended_scores, best = jax.lax.top_k(jnp.concatenate([beams.ended_scores, final], axis=1), count)

    def join(old: jax.Array, new: jax.Array) -> jax.Array:
        return pick(jnp.concatenate([old, new], axis=1), best)

    full = join(beams.full, ending)
    lengths = join(beams.ended_lengths, jnp.broadcast_to(length.astype(jnp.int32), (rows, kept)))
    after = Beams(
        history=pick(history, going),
        scores=running,
        ended=join(beams.ended, history),
        ended_scores=ended_scores,
        ended_lengths=lengths,
        full=full,
        hopeful=beams.hopeful & improvable(running, ended_scores, full, length, place, settings),
        stuck=ends.all(axis=1),
    )
    return after, pick(parents, going)


def improvable(
    running_BK: jax.Array, ended_BK: jax.Array, full_BK: jax.Array, length: Any, place: Place, settings: Generation
) -> jax.Array:
    """Returns bool [B]: whether the best beam that goes on may end better than the worst that has ended.

    Its score is taken as if it ended here; with early_stopping="never" and longer ones favoured, at the greatest length.
    """
    favoured = settings.early_stopping == "never" and settings.length_penalty > 0
    at = jnp.asarray(place.most if favoured else length, jnp.float32)
    possible = running_BK[:, :1] / at**settings.length_penalty
    worst = jnp.where(full_BK, ended_BK.min(axis=1, keepdims=True), NEVER)
    return (possible > worst).any(axis=1)


def going_on(beams: Beams, settings: Generation) -> jax.Array:
    """Returns bool: whether any row can still get better."""
    enough = beams.full.all() if settings.early_stopping is True else False
    return beams.hopeful.any() & ~jnp.asarray(enough) & ~beams.stuck.all()
