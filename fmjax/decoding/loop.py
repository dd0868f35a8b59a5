"""Text generation with a cache: greedy, sampled, or by beam search.

The cache is a value of constant shape, and a whole generation is one compiled function: the prompt,
then a loop until every row has ended. A decoder-only model continues `input_ids`. An
encoder-decoder passes the arrays that its encoder reads (`Encodes.encoder_inputs`: tokens, pixels,
audio features) to `encode`, and continues `decoder_input_ids` or, without them, a single start
token. Prompts may differ in length: their masks mark padding, which may be anywhere, takes no
position, and never counts as a token.

Dimensions: B rows, N = B times sequences (or beams) per row, P prompt columns, W columns of
history, V vocabulary, K beams.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple, TypeAlias

import flax
import jax
import jax.numpy as jnp

from fmjax.contracts import Arrays, Batch, Encodes, Generates, PyTree
from fmjax.decoding import beam
from fmjax.decoding.logits import NONE, Place, process, token_mask
from fmjax.decoding.prompts import Inputs, fill_up, padded, prompt_ids, prompt_names, select_inputs
from fmjax.decoding.settings import Generation, token_limit
from fmjax.errors import UserError
from fmjax.layers.cache import branched, chosen
from fmjax.layers.stack import unstack_layers

STATIC = (
    "model",
    "settings",
    "room",
    "with_scores",
)  # static arguments of `decode`

MOST_SHARING = 8  # samples of a row that share its keys


class Continuations(NamedTuple):
    """New tokens of N = B * num_return_sequences rows, and their scores if requested."""

    tokens: jax.Array  # int32 [N, max_new_tokens], padding after a row's end
    lengths: jax.Array  # int32 [N], number of new tokens, including the end token
    # fp32 [N], summed over the new tokens, under the distributions that they were chosen from:
    # after `logits.process` and, for greedy search and sampling, renormalized, as in the
    # reference's `compute_transition_scores`.
    log_probs: jax.Array | None = None
    # fp32 [N], which rank the beams: log_probs / lengths ** length_penalty. Without beams, the same
    # as log_probs.
    scores: jax.Array | None = None


def generate(
    model: Generates,
    params: PyTree,
    batch: Inputs,
    settings: Generation,
    key: jax.Array | None = None,
) -> jax.Array:
    """Returns int32 [N, P + max_new_tokens]: each prompt with its continuation.

    If an encoder-decoder has no prompt, its start token takes that place. Padding follows the end
    of a row. `batch` may contain other arrays. `key` is for sampling, by default that of seed 0.
    Raises UserError if the settings do not fit the model or the prompt.
    """
    tokens = continuations(model, params, batch, settings, key).tokens
    before = prompt_ids(model, batch, settings)
    before = jnp.repeat(before, settings.num_return_sequences, axis=0)
    return jnp.concatenate([before, tokens], axis=1)


def continuations(
    model: Generates,
    params: PyTree,
    batch: Inputs,
    settings: Generation,
    key: jax.Array | None = None,
    first_row: int = 0,
    with_scores: bool = False,
) -> Continuations:
    """Returns only the new tokens, and `with_scores` their log-probabilities; see `generate`.

    Sampling of row i depends only on the key and `first_row` + i, so a batch may be a part of many
    rows.
    """
    inputs = select_inputs(model, batch, settings)
    rows = len(next(iter(inputs.values())))
    ids, mask = prompt_names(model)
    width = inputs[ids].shape[1] if ids in inputs else 1
    limit = token_limit(model.settings)
    most, least = settings.limits(width, limit)
    filled = fill_up(inputs, (ids, mask), settings.pad, limit)
    numbers = (jnp.int32(number) for number in (0, 0, most, least, width))
    key = jax.random.key(0) if key is None else key
    call = Call(Place(*numbers), jnp.int32(rows), key, jnp.int32(first_row))
    shape = without_lengths(settings)
    found = decode(StaticModel(model), params, filled, call, shape, padded(most), with_scores)
    kept: Continuations = jax.tree.map(
        lambda array: array[: rows * settings.num_return_sequences], found
    )
    return kept._replace(tokens=kept.tokens[:, :most])


def without_lengths(settings: Generation) -> Generation:
    """Returns settings without lengths, which compiled functions receive as numbers."""
    return dataclasses.replace(
        settings, max_new_tokens=None, max_length=None, min_new_tokens=None, min_length=None
    )


def as_generator(model: object) -> Generates:
    """Returns the model. Raises UserError if it has no decoder."""
    if not isinstance(model, Generates):
        raise UserError(
            f"{type(model).__name__} has no decoder, so it cannot generate text; choose another "
            "model or task"
        )
    return model


def check_ids(settings: Generation, size: int) -> None:
    """Raises UserError for a token that the model does not have, since it would have no effect."""
    named = {
        "forced_bos_token_id": settings.forced_bos_token_id,
        "forced_eos_token_id": settings.forced_eos_token_id,
        "bad_words_ids": settings.bad_words_ids,
        "suppress_tokens": settings.suppress_tokens,
        "begin_suppress_tokens": settings.begin_suppress_tokens,
    }
    for name, ids in named.items():
        for number in jax.tree.leaves(ids):
            if number >= size:
                raise UserError(
                    f"{name}: {number} is out of range; the vocabulary has {size} entries, "
                    f"0 to {size - 1}; correct it"
                )


@flax.struct.dataclass
class Call:
    """The inputs of a compiled generation that change from call to call."""

    place: Place  # counted from the end of the prompt
    rows: jax.Array  # number of leading rows that are not padding
    key: jax.Array
    first_row: jax.Array  # number of the first row, for sampling


class StaticModel:
    """A model as a static argument: equal models share a compiled function.

    Linen cannot hash a model that contains a dict.
    """

    def __init__(self, model: Generates):
        self.model = model

    def __hash__(self) -> int:
        return hash(type(self.model))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StaticModel) and self.model == other.model


def sharing(settings: Generation) -> tuple[int, int]:
    """Returns the continuations of each row, and how many of them share its keys and values. Scores
    are computed for the keys of all that share: beams need that, and a few samples gain by it."""
    if settings.num_beams > 1:
        return settings.num_beams, settings.num_beams
    times = settings.num_return_sequences
    return times, max(size for size in range(1, MOST_SHARING + 1) if times % size == 0)


class Start(NamedTuple):
    """The initial state of a search."""

    logits: jax.Array  # [B,V], of the first new token
    history: jax.Array  # int32 [B,W], the prompt and room for new tokens
    alive: jax.Array  # bool [B], rows that are not padding
    cache: PyTree
    memory: Arrays | None  # of an encoder

    def repeated(self, settings: Generation) -> Start:
        """Returns each row as often as it has continuations, which share its keys and values."""
        times, together = sharing(settings)
        several: Start = jax.tree.map(
            lambda leaf: jnp.repeat(leaf, times, axis=0), self._replace(cache=None)
        )
        return several._replace(cache=branched(self.cache, times, together))


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model with its parameters, applied to a prompt and to one more token."""

    model: Generates
    params: PyTree

    def apply(self, method: str, *args: PyTree) -> PyTree:
        return self.model.apply({"params": self.params}, *args, method=method)

    def start(self, inputs: Batch, call: Call, room: int, settings: Generation) -> Start:
        """Returns the logits of the first new token. The prompt's padding moves to the left."""
        ids, mask = prompt_names(self.model)
        memory = None
        if isinstance(self.model, Encodes):
            memory = self.apply(
                "encode", {name: inputs[name] for name in inputs if name not in (ids, mask)}
            )
        tokens = prompt_ids(self.model, inputs, settings)
        batch, history = {ids: tokens}, tokens
        if mask in inputs:
            # Then every row's last token is in the last column.
            real = inputs[mask].astype(bool)
            order = jnp.argsort(real, axis=1, stable=True)
            real = jnp.take_along_axis(real, order, axis=1)
            tokens = jnp.take_along_axis(tokens, order, axis=1)
            batch, history = {ids: tokens, mask: real}, jnp.where(real, tokens, NONE)
        rows, width = tokens.shape
        if width > 1:
            batch["predicted_positions"] = jnp.full((rows, 1), width - 1, jnp.int32)
        empty = self.model.empty_cache(rows, width + room * sharing(settings)[1])
        features, cache = self.apply("decode", batch, memory, empty)
        history = jnp.pad(history.astype(jnp.int32), ((0, 0), (0, room)), constant_values=NONE)
        return Start(features["lm"][:, -1], history, jnp.arange(rows) < call.rows, cache, memory)

    def step(
        self, tokens_N: jax.Array, memory: Arrays | None, cache: PyTree
    ) -> tuple[jax.Array, PyTree]:
        """Returns the logits [N,V] after one more token per row, and the updated cache."""
        ids, _ = prompt_names(self.model)
        features, cache = self.apply("decode", {ids: tokens_N[:, None]}, memory, cache)
        return features["lm"][:, -1], cache


@partial(jax.jit, static_argnames=STATIC)
def decode(
    model: StaticModel,
    params: PyTree,
    inputs: Batch,
    call: Call,
    settings: Generation,
    room: int,
    with_scores: bool = False,
) -> Continuations:
    """Returns continuations with tokens [N,room]."""
    decoder = Decoder(model.model, unstack_layers(params))
    start = decoder.start(inputs, call, room, settings)
    check_ids(settings, start.logits.shape[1])
    width = start.history.shape[1] - room
    place = dataclasses.replace(call.place, column=call.place.column + width)
    search = search_beams if settings.num_beams > 1 else search_single
    found = search(decoder, start, dataclasses.replace(call, place=place), settings, with_scores)
    tokens = jnp.where(
        jnp.arange(room)[None] < found.lengths[:, None], found.tokens[:, width:], settings.pad
    )
    return found._replace(tokens=tokens)


def first_argmax(scores_NV: jax.Array) -> jax.Array:
    """Returns the index of each row's first maximum, int32 [N].

    This is `argmax` in two passes, which is much faster on a CPU.
    """
    size = scores_NV.shape[1]
    greatest = scores_NV == scores_NV.max(axis=1, keepdims=True)
    return jnp.where(greatest, jnp.arange(size, dtype=jnp.int32), size - 1).min(axis=1)


@flax.struct.dataclass
class Rows:
    """The continuations so far, one per row."""

    tokens: jax.Array  # int32 [N], the last ones
    history: jax.Array  # int32 [N,W]
    alive: jax.Array  # bool [N]
    lengths: jax.Array  # int32 [N], new tokens
    log_probs: jax.Array | None  # fp32 [N], summed; None if not asked for
    place: Place


def search_single(
    decoder: Decoder, start: Start, call: Call, settings: Generation, with_scores: bool
) -> Continuations:
    """Returns greedy or sampled continuations, with whole histories [N,W] as tokens."""
    times = settings.num_return_sequences
    start = start.repeated(settings) if times > 1 else start
    count, size = start.logits.shape
    # A row's draws depend on its index, not on the number of other rows.
    fold = jax.random.fold_in
    keys = jax.vmap(partial(fold, call.key))(call.first_row * times + jnp.arange(count))
    ends = jnp.asarray(token_mask(settings.eos_token_id, size)[0])

    def choose(logits: jax.Array, rows: Rows) -> Rows:
        scores = process(logits.astype(jnp.float32), rows.history, rows.place, settings)
        if settings.do_sample:
            now = jax.vmap(fold, (0, None))(keys, rows.place.generated)
            tokens = jax.vmap(jax.random.categorical)(now, scores)
        else:
            tokens = first_argmax(scores)
        log_probs = rows.log_probs
        if log_probs is not None:
            chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), tokens[:, None], axis=1)[:, 0]
            log_probs = log_probs + jnp.where(rows.alive, chosen, 0.0)
        tokens = jnp.where(rows.alive, tokens, settings.pad).astype(jnp.int32)
        history = jax.lax.dynamic_update_slice(
            rows.history, tokens[:, None], (0, rows.place.column)
        )
        alive, lengths = rows.alive & ~ends[tokens], rows.lengths + rows.alive
        return Rows(tokens, history, alive, lengths, log_probs, rows.place.next())

    def body(state: tuple[Rows, PyTree]) -> tuple[Rows, PyTree]:
        rows, cache = state
        logits, cache = decoder.step(rows.tokens, start.memory, cache)
        return choose(logits, rows), cache

    def unfinished(state: tuple[Rows, PyTree]) -> jax.Array:
        place = state[0].place
        return (place.generated < place.most) & state[0].alive.any()

    zeros = jnp.zeros(count, jnp.int32)
    log_probs = jnp.zeros(count) if with_scores else None
    first = choose(
        start.logits, Rows(zeros, start.history, start.alive, zeros, log_probs, call.place)
    )
    rows, _ = jax.lax.while_loop(unfinished, body, (first, start.cache))
    return Continuations(rows.history, rows.lengths, rows.log_probs, rows.log_probs)


def search_beams(
    decoder: Decoder, start: Start, call: Call, settings: Generation, with_scores: bool
) -> Continuations:
    """Returns each row's best continuations, best first, with whole histories [N,W] as tokens."""
    rows, count, returned = len(start.history), settings.num_beams, settings.num_return_sequences
    several = start.repeated(settings)
    State: TypeAlias = tuple[beam.Beams, PyTree, Place]

    def choose(logits: jax.Array, beams: beam.Beams, cache: PyTree, place: Place) -> State:
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
        log_probs = process(log_probs, beams.running.reshape(rows * count, -1), place, settings)
        beams, parents = beam.advance(beams, log_probs.reshape(rows, count, -1), place, settings)
        return beams, chosen(cache, parents), place.next()

    def body(state: State) -> State:
        beams, cache, place = state
        before = place.column - 1
        tokens = jax.lax.dynamic_index_in_dim(beams.running, before, axis=2, keepdims=False)
        logits, cache = decoder.step(tokens.reshape(-1), several.memory, cache)
        return choose(logits, beams, cache, place)

    begun = beam.start_beams(start.history, start.alive, count)
    first = choose(several.logits, begun, several.cache, call.place)

    def unfinished(state: State) -> jax.Array:
        return beam.unfinished(state[0], settings)

    beams, _, _ = jax.lax.while_loop(unfinished, body, first)
    tokens = beams.finished[:, :returned].reshape(rows * returned, -1)
    lengths = beams.lengths[:, :returned].reshape(-1)
    if not with_scores:
        return Continuations(tokens, lengths)
    scores = beams.scores[:, :returned].reshape(-1)
    return Continuations(tokens, lengths, scores * lengths**settings.length_penalty, scores)
