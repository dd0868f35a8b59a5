"""Prompts and encoder inputs, padded to a few shapes.

A decoder-only model continues `input_ids`; an encoder-decoder continues `decoder_input_ids` or,
without them, a start token. Host batches are padded to a few shapes, so that few functions are
compiled; device batches, which may be sharded, keep their shape.

Dimensions: B rows, P prompt columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fmjax.contracts import Encodes, Generates
from fmjax.decoding.settings import Generation
from fmjax.errors import UserError

Array: TypeAlias = jax.Array | np.ndarray
Inputs: TypeAlias = Mapping[str, Array]

PROMPT = ("input_ids", "attention_mask")
DECODER_PROMPT = ("decoder_input_ids", "decoder_attention_mask")


def prompt_names(model: Generates) -> tuple[str, str]:
    """Returns the names of the prompt's ids and mask."""
    return DECODER_PROMPT if isinstance(model, Encodes) else PROMPT


def prompt_ids(model: Generates, batch: Inputs, settings: Generation) -> jax.Array:
    """Returns the prompt [B,P]; for an encoder-decoder without one, the start token [B,1]."""
    name, _ = prompt_names(model)
    if name in batch or not isinstance(model, Encodes):
        return jnp.asarray(batch[name], jnp.int32)
    rows = len(next(batch[name] for name in model.encoder_inputs if name in batch))
    return jnp.full((rows, 1), start_id(model, settings), jnp.int32)


def start_id(model: Encodes, settings: Generation) -> int:
    """Returns the token that a decoder starts with. Raises UserError if it is not defined."""
    for number in (settings.decoder_start_token_id, settings.bos_token_id, model.start_id):
        if number is not None:
            return number
    raise UserError("the decoder's start token is unknown; pass decoder_start_token_id")


def select_inputs(model: Generates, batch: Inputs, settings: Generation) -> dict[str, Array]:
    """Returns the encoder's inputs and the prompt, with a mask if padding implies one."""
    ids, mask = prompt_names(model)
    encoder = model.encoder_inputs if isinstance(model, Encodes) else ()
    inputs = {name: batch[name] for name in (*encoder, ids, mask) if name in batch}
    if not encoder and mask not in inputs and settings.infers_padding:
        inputs[mask] = inputs[ids] != settings.pad
    return inputs


def padded(length: int) -> int:
    """Returns a length rounded up to one of a few values.

    The result is a multiple of an eighth of the next power of two, or of 8 if that is more.
    """
    step = max(8, 1 << max(length.bit_length() - 3, 0))
    return -(-length // step) * step


def fill_up(
    inputs: dict[str, Array], prompt: tuple[str, str], pad: int, positions: int
) -> dict[str, Array]:
    """Returns host arrays with the number of rows padded to a power of two; device arrays
    unchanged.

    Token columns are also padded to a few lengths, at most `positions` if there is a limit, and
    masked: the prompt on the left, encoder inputs (and other numbers per token, such as token
    types) on the right. Other arrays only change their number of rows.
    """
    if any(isinstance(array, jax.Array) for array in inputs.values()):
        return inputs
    arrays = {name: np.asarray(array) for name, array in inputs.items()}
    for ids, mask in (PROMPT, DECODER_PROMPT):
        if ids in arrays:
            arrays[ids] = arrays[ids].astype(np.int32)
            arrays[mask] = arrays.get(mask, np.ones(arrays[ids].shape)) != 0
    rows = len(next(iter(arrays.values())))
    source = arrays[PROMPT[0]].shape if PROMPT[0] in arrays else None
    filled: dict[str, Array] = {}
    for name, array in arrays.items():
        spare = [(0, (1 << (rows - 1).bit_length()) - rows)] + [(0, 0)] * (array.ndim - 1)
        if name in prompt or array.shape == source:
            whole = padded(array.shape[1])
            columns = max((min(whole, positions) if positions else whole) - array.shape[1], 0)
            spare[1] = (columns, 0) if name in prompt else (0, columns)
        value = pad if name in (PROMPT[0], DECODER_PROMPT[0]) else 0
        filled[name] = np.pad(array, spare, constant_values=value)
    return filled
