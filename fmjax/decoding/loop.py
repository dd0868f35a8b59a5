"""Text generation with a cache: greedy, sampled, or by beam search. Letters as in `scores.py` and `beam.py`; P prompt columns.

The cache is a value of constant shape, and the whole of a generation is one compiled function: the prompt, then a loop that
ends as soon as every row has. Batches on the host are filled up to few shapes, so that few functions are compiled; one that
lies on devices already, and may be sharded there, keeps its shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.decoding import beam
from fmjax.decoding.logits import NONE, Place, among, process
from fmjax.decoding.settings import Generation, merged, special_tokens
from fmjax.errors import UserError
from fmjax.layers.stack import unstack_layers

Batch = Mapping[str, Any]
LENGTHS = ("max_new_tokens", "max_length", "min_new_tokens", "min_length")


def settings_for(tokenizer: Tokenizer, given: Mapping[str, Any], model_settings: Any) -> Generation:
    """Returns the settings `given`, and the special tokens that they do not name: padding and end of the tokenizer, the
    decoder's first of the model's settings. Raises UserError as `merged` does."""
    return merged(special_tokens(tokenizer, model_settings), given)


def generate(model: nn.Module, params: Any, batch: Batch, settings: Generation, key: jax.Array | None = None) -> jax.Array:
    """Returns int32 [rows * num_return_sequences, length]: each prompt with its continuation, or what the decoder of an
    encoder-decoder begins with and its output; after a row's end, padding up to the greatest length there may be.

    Reads `input_ids` and, where it is there, `attention_mask`; padding may stand anywhere. `key` is that of sampling, 0 if
    none is given. Raises UserError if the settings do not fit the model or the prompt.
    """
    made, _ = continuations(model, params, batch, settings, key)
    if hasattr(model, "encode"):
        before = jnp.full((made.shape[0], 1), start_id(model, settings), jnp.int32)
    else:
        before = jnp.repeat(jnp.asarray(batch["input_ids"], jnp.int32), settings.num_return_sequences, axis=0)
    return jnp.concatenate([before, made], axis=1)


def continuations(
    model: nn.Module, params: Any, batch: Batch, settings: Generation, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the new tokens alone [rows * num_return_sequences, room], and how many there are of each: int32 [rows * ...]."""
    ids = batch["input_ids"]
    rows = ids.shape[0]
    width = 1 if hasattr(model, "encode") else ids.shape[1]
    most, least = settings.limits(width, model.settings.positions)
    inputs = {"input_ids": ids}
    if "attention_mask" in batch:
        inputs["attention_mask"] = batch["attention_mask"]
    elif not hasattr(model, "encode") and settings.infers_padding:
        inputs["attention_mask"] = ids != settings.pad
    inputs = fill_up(inputs, hasattr(model, "encode"), settings.pad, model.settings.positions)
    # The lengths are numbers that the compiled function is given, not a part of it.
    unset: dict[str, Any] = dict.fromkeys(LENGTHS)
    shape = dataclasses.replace(settings, **unset)
    place = Place(*(jnp.int32(number) for number in (0, 0, most, least, width)))
    key = jax.random.key(0) if key is None else key
    made, lengths = decode(Static(model), params, inputs, place, jnp.int32(rows), key, shape, padded(most))
    kept = rows * settings.num_return_sequences
    return made[:kept, :most], lengths[:kept]


def start_id(model: Any, settings: Generation) -> int:
    """Returns what a decoder begins with. Raises UserError if nothing says it."""
    for number in (settings.decoder_start_token_id, settings.bos_token_id, getattr(model.settings, "start_id", None)):
        if number is not None:
            return int(number)
    raise UserError("nothing says what the decoder begins with; give decoder_start_token_id")


def check_ids(settings: Generation, size: int) -> None:
    """Raises UserError for a token that the model does not have: it would be passed over in silence."""
    for name in ("forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"):
        for number in jax.tree.leaves(getattr(settings, name)):
            if number >= size:
                raise UserError(f"{name}: {number} is out of range; the vocabulary has {size} entries, 0 to {size - 1}; correct")


def padded(length: int) -> int:
    """Returns a length rounded up to one of few: to an eighth of the power of two above it, and 8 at least."""
    step = max(8, 1 << max(length.bit_length() - 3, 0))
    return -(-length // step) * step


def fill_up(inputs: dict[str, Any], right: bool, pad: int, positions: int) -> dict[str, Any]:
    """Returns a batch of the host with rows a power of two, and columns of few numbers, masked; others as they are."""
    ids = inputs["input_ids"]
    if isinstance(ids, jax.Array):
        return inputs
    rows, width = ids.shape
    more, whole = (1 << (rows - 1).bit_length()) - rows, padded(width)
    room = max((min(whole, positions) if positions else whole) - width, 0)
    columns = (0, room) if right else (room, 0)
    mask = inputs.get("attention_mask", np.ones(ids.shape, bool))
    return {
        "input_ids": np.pad(np.asarray(ids, np.int32), ((0, more), columns), constant_values=pad),
        "attention_mask": np.pad(np.asarray(mask) != 0, ((0, more), columns), constant_values=False),
    }


class Static:
    """A model as an argument that a compiled function belongs to: like models share it. (Linen cannot hash those that hold a
    dictionary.)"""

    def __init__(self, model: Any):
        self.model = model

    def __hash__(self) -> int:
        return hash(type(self.model))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.model == other.model


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model with its parameters: what it makes of a prompt, and of one more token."""

    model: Any
    params: Any

    def apply(self, *args: Any, method: str) -> Any:
        return self.model.apply({"params": self.params}, *args, method=method)

    def prompt(self, inputs: Batch, room: int, settings: Generation) -> tuple[jax.Array, Any, Any, jax.Array]:
        """Returns the first logits [B,V], the cache, the memory, and the history [B,P+room] of the prompt."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        rows, width = ids.shape
        if hasattr(self.model, "encode"):
            memory = self.apply(inputs, method="encode")
            first = jnp.full((rows, 1), start_id(self.model, settings), jnp.int32)
            batch, history = {"decoder_input_ids": first}, first
        else:
            memory = None
            real = jnp.ones((rows, width), bool) if mask is None else mask.astype(bool)
            # All padding goes to the left: then every row's last token stands in the last column.
            order = jnp.argsort(real, axis=1, stable=True)
            ids, real = jnp.take_along_axis(ids, order, axis=1), jnp.take_along_axis(real, order, axis=1)
            end = jnp.full((rows, 1), width - 1, jnp.int32)
            batch = {"input_ids": ids, "attention_mask": real, "predicted_positions": end}
            history = jnp.where(real, ids, NONE).astype(jnp.int32)
        empty = self.model.empty_cache(rows, history.shape[1] + room)
        features, cache = self.apply(batch, memory, empty, method="decode")
        return features["lm"][:, -1], cache, memory, jnp.pad(history, ((0, 0), (0, room)), constant_values=NONE)

    def step(self, tokens_N: jax.Array, memory: Any, cache: Any) -> tuple[jax.Array, Any]:
        """Returns the logits [N,V] after one more token of each row, and the cache with it."""
        name = "decoder_input_ids" if hasattr(self.model, "encode") else "input_ids"
        features, cache = self.apply({name: tokens_N[:, None]}, memory, cache, method="decode")
        return features["lm"][:, -1], cache


@partial(jax.jit, static_argnames=("model", "settings", "room"))
def decode(
    model: Static, params: Any, inputs: Batch, place: Place, rows: jax.Array, key: jax.Array, settings: Generation, room: int
) -> tuple[jax.Array, jax.Array]:
    """Returns new tokens [N,room] and their numbers [N]; `rows` counts the first of the inputs that do not only fill up."""
    decoder = Decoder(model.model, unstack_layers(params))
    logits, cache, memory, history = decoder.prompt(inputs, room, settings)
    check_ids(settings, logits.shape[1])
    width = history.shape[1] - room
    place = dataclasses.replace(place, column=place.column + width)
    alive = jnp.arange(history.shape[0]) < rows
    search = beams if settings.num_beams > 1 else singles
    history, lengths = search(decoder, logits, cache, memory, history, alive, place, key, settings)
    made = history[:, width:]
    return jnp.where(jnp.arange(room)[None] < lengths[:, None], made, settings.pad), lengths


def repeat(cache: Any, memory: Any, times: int) -> tuple[Any, Any]:
    """Returns the cache and the memory with each row there `times`, side by side."""
    rows = {name: part for name, part in cache.items() if name != "index"}
    rows, memory = jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), (rows, memory))
    return cache | rows, memory


def best(scores_NV: jax.Array) -> jax.Array:
    """Returns the first of each row's greatest, int32 [N]: argmax in two passes, which a CPU does in a fraction of the time."""
    size = scores_NV.shape[1]
    greatest = scores_NV == scores_NV.max(axis=1, keepdims=True)
    return jnp.where(greatest, jnp.arange(size, dtype=jnp.int32), size - 1).min(axis=1)


def moved(place: Place) -> Place:
    return dataclasses.replace(place, column=place.column + 1, made=place.made + 1)


def singles(
    decoder: Decoder, logits: Any, cache: Any, memory: Any, history: Any, alive: Any, place: Place, key: Any, settings: Generation
) -> tuple[jax.Array, jax.Array]:
    """Returns the histories [N,W] of one continuation at a time, greedy or sampled, and their numbers of new tokens [N]."""
    if (times := settings.num_return_sequences) > 1:
        cache, memory = repeat(cache, memory, times)
        logits, history, alive = (jnp.repeat(array, times, axis=0) for array in (logits, history, alive))
    # A row's draws depend on its number and not on how many others there are.
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(history.shape[0]))
    ends = jnp.asarray(among(settings.eos_token_id, logits.shape[1])[0])

    def choose(logits: Any, history: Any, alive: Any, lengths: Any, place: Place) -> tuple[Any, ...]:
        scores = process(logits.astype(jnp.float32), history, place, settings)
        if settings.do_sample:
            now = jax.vmap(jax.random.fold_in, (0, None))(keys, place.made)
            tokens = jax.vmap(jax.random.categorical)(now, scores)
        else:
            tokens = best(scores)
        tokens = jnp.where(alive, tokens, settings.pad).astype(jnp.int32)
        history = jax.lax.dynamic_update_slice(history, tokens[:, None], (0, place.column))
        return tokens, history, alive & ~ends[tokens], lengths + alive, moved(place)

    def body(state: Any) -> Any:
        (tokens, *rest), cache = state
        logits, cache = decoder.step(tokens, memory, cache)
        return choose(logits, *rest), cache

    def unfinished(state: Any) -> jax.Array:
        (_, _, alive, _, place), _ = state
        return (place.made < place.most) & alive.any()

    first = choose(logits, history, alive, jnp.zeros(history.shape[0], jnp.int32), place)
    (_, history, _, lengths, _), _ = jax.lax.while_loop(unfinished, body, (first, cache))
    return history, lengths


def beams(
    decoder: Decoder, logits: Any, cache: Any, memory: Any, history: Any, alive: Any, place: Place, key: Any, settings: Generation
) -> tuple[jax.Array, jax.Array]:
    """Returns the histories [N,W] of the best continuations of each row, the best first, and their numbers of new tokens [N]."""
    rows, count, returned = history.shape[0], settings.num_beams, settings.num_return_sequences
    cache, memory = repeat(cache, memory, count)
    column: Callable[..., Any] = jax.lax.dynamic_index_in_dim

    def choose(logits: Any, found: beam.Beams, cache: Any, place: Place) -> tuple[Any, ...]:
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
        log_probs = process(log_probs, found.history.reshape(rows * count, -1), place, settings)
        found, parents = beam.advance(found, log_probs.reshape(rows, count, -1), place, settings)
        return found, reorder(cache, parents), moved(place)

    def body(state: Any) -> Any:
        found, cache, place = state
        tokens = column(found.history, place.column - 1, axis=2, keepdims=False).reshape(-1)
        logits, cache = decoder.step(tokens, memory, cache)
        return choose(logits, found, cache, place)

    logits = jnp.repeat(logits, count, axis=0)
    first = choose(logits, beam.begin(history, alive, count), cache, place)
    found, _, _ = jax.lax.while_loop(lambda state: beam.going_on(state[0], settings), body, first)
    return found.ended[:, :returned].reshape(rows * returned, -1), found.ended_lengths[:, :returned].reshape(-1)


def reorder(cache: Any, parents_BK: jax.Array) -> Any:
    """Returns the cache of beams with each beam's keys and values those of its parent.

    The keys of the memory, the mask and the positions are the same for all beams of a row, and stay.
    """
    rows, count = parents_BK.shape
    flat = (jnp.arange(rows)[:, None] * count + parents_BK).reshape(-1)
    layers = [
        {name: part if name == "cross" else jax.tree.map(lambda leaf: leaf[flat], part) for name, part in layer.items()}
        for layer in cache["layers"]
    ]
    return cache | {"layers": tuple(layers)}
