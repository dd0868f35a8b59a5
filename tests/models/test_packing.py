"""In a packed row no text sees another: in every family that serves token losses, the logits of a row of several texts are those
of each text alone, with no segment said; and it shows where segments are ignored, or positions run on."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import models
from fmjax.models import t5
from fmjax.tasks.token_rows import packed_pairs, packed_row, pair

VOCABULARY, PAD = 30, 1
SIZE = {"width": 16, "layers": 1, "attention_heads": 2, "mlp_width": 24, "vocab_size": VOCABULARY}
TALL = SIZE | {"head_width": 8, "decoder_layers": 1}
SOURCES, TARGETS = (7, 4, 6), (5, 8, 3)  # lengths of texts
LENGTH, TARGET_LENGTH = 20, 18  # of rows
TOLERANCE = 1e-5

ENCODERS = {
    "bert": SIZE | {"positions": LENGTH},
    "roberta": SIZE | {"positions": LENGTH, "position_offset": PAD + 1},
    "distilbert": SIZE | {"positions": LENGTH},
    "electra": SIZE | {"positions": LENGTH, "embedding_width": 12},
}
ROTARY = {
    "llama": SIZE | {"kv_heads": 1},
    "mistral": SIZE | {"kv_heads": 1, "window": 3},
    "qwen2": SIZE | {"kv_heads": 2},
}
DECODERS = {"gpt": SIZE | {"positions": LENGTH}} | ROTARY
PAIRED: dict[str, dict[str, Any]] = {
    "t5": TALL | {"buckets": 8, "furthest": 10},
    "t5:v1_1": TALL | {"buckets": 8, "furthest": 10} | t5.V1_1,  # mT5's parts
    "transformer": SIZE | {"positions": LENGTH, "start_id": PAD},
    "bart": SIZE | {"positions": LENGTH},
    "mbart": SIZE | {"positions": LENGTH},
}
EVERY = {**ENCODERS, **DECODERS, **PAIRED}
# One of each kind of code runs every time; the others, which are these with other edges, in CI.
QUICK = ("bert", "mistral", "t5", "bart")
CASES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.full) for name in EVERY]
# What of a row is made wrong, and the families in which that changes nothing: rotary angles are relative, and T5 has distances.
SEGMENTS = ("segment_ids", "decoder_segment_ids")
POSITIONS = ("position_ids", "decoder_position_ids")
RELATIVE = {"position_ids": (*ROTARY, "t5", "t5:v1_1")}


@functools.cache
def logits(name: str) -> Any:
    """Returns the function batch -> logits of a small model whose parameters, biases and norms too, are random at order 0.3."""
    kind = "mlm" if name in ENCODERS else "lm"
    model = models.family(name.partition(":")[0]).build(heads={kind: {}}, **EVERY[name])
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), model.one_row_batch())["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    return jax.jit(lambda batch: model.apply({"params": params}, batch)[kind])


@functools.cache
def texts(lengths: tuple[int, ...], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCABULARY, length).astype(np.int32) for length in lengths]


def together(name: str) -> dict[str, np.ndarray]:
    """Returns a batch of one packed row, with padding at its end."""
    sources = texts(SOURCES, 1)
    if name in PAIRED:
        row = packed_pairs(sources, texts(TARGETS, 2), (LENGTH, TARGET_LENGTH), PAD)
    else:
        row = packed_row(sources, LENGTH, PAD)
    return {key: array[None] for key, array in row.items()}


def alone(name: str) -> list[np.ndarray]:
    """Returns the logits of each text, in a row of its own that says nothing of segments or positions."""
    if name in PAIRED:
        rows = [pair(*both, (LENGTH, TARGET_LENGTH), PAD) for both in zip(texts(SOURCES, 1), texts(TARGETS, 2), strict=True)]
        rows = [{key: row[key] for key in ("input_ids", "attention_mask", "labels")} for row in rows]
    else:
        rows = [packed_row([ids], LENGTH, PAD) for ids in texts(SOURCES, 1)]
        rows = [{"input_ids": row["input_ids"], "attention_mask": row["segment_ids"]} for row in rows]
    found = np.asarray(logits(name)({key: jnp.stack([row[key] for row in rows]) for key in rows[0]}))
    return [found[index, :length] for index, length in enumerate(TARGETS if name in PAIRED else SOURCES)]


@functools.cache
def packed(name: str) -> np.ndarray:
    """Returns the logits of what is no padding in the packed row [tokens, V]."""
    return real(name, together(name))


def real(name: str, row: dict[str, np.ndarray]) -> np.ndarray:
    there = together(name)["decoder_segment_ids" if name in PAIRED else "segment_ids"][0] > 0
    return np.asarray(logits(name)(row))[0, there]


@pytest.mark.parametrize("name", CASES)
def test_packed_logits_are_those_of_each_text_alone(name):
    apart = np.concatenate(alone(name))
    assert packed(name).shape == apart.shape and np.abs(apart).max() > 0.1
    np.testing.assert_allclose(packed(name), apart, atol=TOLERANCE * max(1, np.abs(apart).max()))


@pytest.mark.parametrize("name", CASES)
def test_segments_that_are_ignored_show(name):
    row = together(name)
    there = [key for key in SEGMENTS if key in row]
    for wrong in ([key] for key in there) if len(there) == 1 else (there, *([key] for key in there)):
        mixed = real(name, row | {key: (row[key] > 0).astype(np.int32) for key in wrong})
        assert np.abs(mixed - packed(name)).max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_positions_that_run_on_show_where_they_are_absolute(name):
    row = together(name)
    for key in POSITIONS:
        if key in row:
            running = real(name, row | {key: np.arange(row[key].shape[1], dtype=np.int32)[None]})
            difference = np.abs(running - packed(name)).max()
            assert (
                difference < 10 * TOLERANCE * max(1, np.abs(packed(name)).max())
                if name in RELATIVE.get(key, ())
                else difference > 100 * TOLERANCE
            )


def test_both_masks_hold_where_both_are_given():
    row = together("bert")
    both = row | {"attention_mask": (row["segment_ids"] > 0).astype(np.int32)}
    np.testing.assert_allclose(real("bert", both), packed("bert"), atol=TOLERANCE)


def test_every_family_that_serves_token_losses_is_here():
    with_tokens = {name for name, family in models.families().items() if "vocab_size" in family.Settings.__dataclass_fields__}
    assert with_tokens == {name.partition(":")[0] for name in EVERY}
