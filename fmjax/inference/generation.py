"""Generation by a loaded model, with the inputs and outputs of transformers' `generate`.

Dimensions: B rows, N = B * num_return_sequences, P prompt columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from fmjax.contracts import Encodes, Generates, HostBatch, PyTree
from fmjax.decoding.loop import continuations
from fmjax.decoding.prompts import DECODER_PROMPT, PROMPT, prompt_names, start_id
from fmjax.decoding.settings import Generation
from fmjax.errors import UserError
from fmjax.hardware import explained
from fmjax.randomness import seeded_key


class Generated(NamedTuple):
    """Generated sequences with their scores: the result of `generate(..., return_scores=True)`.

    Log-probabilities are under the distributions that tokens are chosen from, after all settings
    such as `temperature` and `repetition_penalty`: the sum over the new tokens of the reference's
    `compute_transition_scores` (with `normalize_logits` for greedy search and sampling).
    """

    sequences: np.ndarray  # int32 [N, length], prompts with their continuations
    log_probs: np.ndarray  # fp32 [N], summed over the new tokens, including the end token
    # fp32 [N], for beams log_probs / new tokens ** length_penalty; otherwise log_probs
    sequences_scores: np.ndarray


def input_names(model: Generates) -> tuple[str, ...]:
    """Returns the names of the inputs of generation: arrays of the encoder, and the prompt with its
    mask."""
    return (*model.encoder_inputs, *DECODER_PROMPT) if isinstance(model, Encodes) else PROMPT


def generated(
    checked_batch: Callable[[HostBatch], dict[str, np.ndarray]],
    model: Generates,
    params: PyTree,
    arrays: HostBatch,
    settings: Generation,
    seed: int = 0,
    first_row: int = 0,
    return_scores: bool = False,
    starts_prompts: bool = True,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Returns the sequences, padded to the longest, and, if requested, the scores of `Generated`.

    `checked_batch` converts the reference's inputs to the model's batch. `first_row` is the index
    of the first row among all rows that share a seed. `starts_prompts` says whether an
    encoder-decoder's prompts get a start token if none begins with it. Raises UserError for inputs
    that `checked_batch` rejects, a prompt without a token, and settings that do not fit the model
    or the prompt."""
    prompt, _ = prompt_names(model)
    complete = arrays
    if isinstance(model, Encodes):
        complete = with_start(arrays, start_id(model, settings), starts_prompts)
    checked = checked_batch(complete)
    # Without a prompt, decoding itself adds a start token.
    inputs = {name: array for name, array in checked.items() if name in arrays}
    key = seeded_key(seed, "seed")
    with explained(), jax.default_matmul_precision("float32"):
        found = continuations(model, params, inputs, settings, key, first_row, return_scores)
    tokens, lengths = np.asarray(found.tokens), np.asarray(found.lengths)
    filler = settings.pad
    if settings.num_beams > 1 and filler == 0:
        # If the padding id is 0, the reference fills up beams with the end token, not with padding.
        filler = (*settings.eos_token_id, 0)[0]
    tokens = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, filler)
    tokens = tokens[:, : lengths.max()]
    before = np.repeat(checked[prompt], settings.num_return_sequences, axis=0)
    sequences = np.concatenate([before, tokens], axis=1).astype(np.int32)
    if found.log_probs is None or found.scores is None:
        return sequences, None, None
    return sequences, np.asarray(found.log_probs), np.asarray(found.scores)


def continued(
    checked_batch: Callable[[HostBatch], dict[str, np.ndarray]],
    model: Generates,
    params: PyTree,
    settings: Generation,
    seed: int,
    batch: HostBatch,
    first_row: int,
    starts_prompts: bool = True,
) -> dict[str, np.ndarray]:
    """Returns the outputs that a task describes: `generated [B,T]`; see `generated`.

    A setting that counts the prompt's tokens, `max_length` or `min_length`, counts those of each
    prompt separately, so that an answer does not depend on the rest of its batch.
    """
    inputs = {name: batch[name] for name in input_names(model) if name in batch}
    counts_prompt = settings.max_new_tokens is None or (
        settings.min_new_tokens is None and settings.min_length is not None
    )
    if isinstance(model, Encodes) or not counts_prompt:
        found, _, _ = generated(
            checked_batch,
            model,
            params,
            inputs,
            settings,
            seed,
            first_row,
            starts_prompts=starts_prompts,
        )
        return {"generated": found}
    ids, mask = PROMPT
    rows = []
    for index, size in enumerate(inputs[mask].sum(axis=1).tolist()):
        alone = {name: inputs[name][index : index + 1, -size:] for name in (ids, mask)}
        row, _, _ = generated(
            checked_batch, model, params, alone, settings, seed, first_row + index
        )
        rows.append(np.concatenate([inputs[ids][index, :-size], row[0]]))
    width = max(row.size for row in rows)
    padded = [np.pad(row, (0, width - row.size), constant_values=settings.pad) for row in rows]
    return {"generated": np.stack(padded)}


def with_start(
    arrays: Mapping[str, np.ndarray], start: int, before_prompts: bool
) -> dict[str, np.ndarray]:
    """Returns an encoder-decoder's inputs; missing prompts become the start token.

    With `before_prompts`, it is added to all prompts if none begins with it, as in the reference. A
    Whisper model, whose prompts have the language and the task, begins with the given prompt.
    Raises UserError if a row's mask leaves nothing of its prompt.
    """
    ids, mask = DECODER_PROMPT
    if ids not in arrays:
        rows = len(next(iter(arrays.values())))
        return {**arrays, ids: np.full((rows, 1), start)}
    real = np.asarray(arrays.get(mask, np.ones(arrays[ids].shape))) != 0
    empty = np.flatnonzero(~real.any(axis=1))
    if empty.size:
        raise UserError(f"{mask}: row {empty[0]} has no token left; keep at least one")
    first = np.take_along_axis(arrays[ids], real.argmax(axis=1)[:, None], axis=1)
    if (first == start).any() or not before_prompts:
        return dict(arrays)
    before = ((0, 0), (1, 0))
    longer = {ids: np.pad(arrays[ids], before, constant_values=start)}
    if mask in arrays:
        longer[mask] = np.pad(arrays[mask], before, constant_values=1)
    return {**arrays, **longer}
