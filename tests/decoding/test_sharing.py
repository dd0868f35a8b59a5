"""Continuations that share a row's keys and values, against whole texts computed anew, and what the loop copies."""

from __future__ import annotations

import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import models
from fmjax.decoding import loop, prompts
from fmjax.decoding.logits import Place
from fmjax.decoding.settings import Generation, merge

WORDS, ROWS, WIDTH, MOST = 23, 3, 5, 9
TINY = {"width": 16, "layers": 2, "attention_heads": 4, "mlp_width": 16, "vocab_size": WORDS}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": TINY | {"positions": 24},
    "mistral": TINY | {"kv_heads": 2, "window": 3},
    "t5": TINY | {"decoder_layers": 2, "head_width": 4, "buckets": 8, "max_distance": 12},
    "transformer": TINY | {"start_id": 1},
}
PROMPT = {
    "input_ids": np.arange(ROWS * WIDTH).reshape(ROWS, WIDTH) + 3,
    "attention_mask": np.arange(WIDTH) >= np.array([[0], [2], [3]]),
}


def built(family: str) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """Returns a tiny model, random parameters, and inputs with padding."""
    model: Any = models.family(family).build(heads={"lm": {}}, **FAMILIES[family])
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), model.one_row_batch())["params"])
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda leaf: (0.5 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)
    if "gpt" in family or "mistral" in family:
        return model, params, PROMPT
    source = {"input_ids": PROMPT["input_ids"][:, ::-1], "attention_mask": PROMPT["attention_mask"][:, ::-1]}
    return model, params, source | {f"decoder_{name}": array for name, array in PROMPT.items()}


class Recomputed:
    """A model whose cache is the text of each continuation, from which it computes everything anew."""

    prefix = ""

    def __init__(self, model: Any):
        self.model, self.settings = model, model.settings

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None  # type: ignore[assignment]

    def apply(self, variables: Any, *args: Any, method: str) -> Any:
        return getattr(self, method)(variables, *args)

    def empty_cache(self, rows: int, length: int) -> dict[str, Any]:
        text = {"ids": jnp.zeros((rows, length), jnp.int32), "real": jnp.zeros((rows, length), bool)}
        return {"index": jnp.int32(0), "layers": ({"text": text},)}

    def decode(self, variables: Any, batch: Any, memory: Any, cache: Any) -> Any:
        ids, place = batch[f"{self.prefix}input_ids"], cache["index"]
        new = {"ids": ids, "real": batch.get(f"{self.prefix}attention_mask", jnp.ones_like(ids)).astype(bool)}
        write = jax.lax.dynamic_update_slice
        text = {name: write(old, new[name], (0, place)) for name, old in cache["layers"][0]["text"].items()}
        positions = jnp.maximum(jnp.cumsum(text["real"], axis=1) - 1, 0)
        whole = {"input_ids": text["ids"], "attention_mask": text["real"], "position_ids": positions}
        last = place + ids.shape[1]
        asked = {f"{self.prefix}{name}": array for name, array in whole.items()}
        asked["predicted_positions"] = jnp.full((len(ids), 1), last - 1)
        features, _ = self.model.apply(variables, asked, memory, None, method="decode")
        return features, {"index": last, "layers": ({"text": text},)}


class RecomputedPair(Recomputed):
    """The same with an encoder."""

    prefix = "decoder_"
    start_id = 1

    def __init__(self, model: Any):
        super().__init__(model)
        self.encoder_inputs = model.encoder_inputs

    def encode(self, variables: Any, batch: Any) -> Any:
        return self.model.apply(variables, batch, method="encode")


BEAMS = {"num_beams": 4, "num_return_sequences": 4, "early_stopping": True, "length_penalty": 0.5}
SAMPLES = {"do_sample": True, "num_return_sequences": 3}


@pytest.mark.parametrize(
    ("family", "how"),
    [("gpt", BEAMS), ("mistral", BEAMS), ("t5", BEAMS), ("mistral", SAMPLES),
     pytest.param("transformer", BEAMS, marks=pytest.mark.full), pytest.param("t5", SAMPLES, marks=pytest.mark.full)],
)  # fmt: skip
def test_continuations_are_those_of_texts_computed_anew(family, how):
    model, params, inputs = built(family)
    settings = merge({"max_new_tokens": MOST, "eos_token_id": 2, "pad_token_id": 0}, how)
    anew = (RecomputedPair if "decoder_input_ids" in inputs else Recomputed)(model)
    with jax.default_matmul_precision("float32"):
        found, expected = (
            loop.continuations(each, params, inputs, settings, jax.random.key(1), with_scores=True) for each in (model, anew)
        )
    assert len({tuple(row) for row in np.asarray(expected.tokens).tolist()}) > ROWS  # continuations differ
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=1e-4, atol=1e-5)


def test_a_few_samples_share_and_all_beams():
    def shared(**how: Any) -> tuple[int, int]:
        return loop.sharing(Generation(**how))

    assert [shared(num_beams=count) for count in (4, 11)] == [(4, 4), (11, 11)]
    samples = [shared(do_sample=True, num_return_sequences=count) for count in (1, 6, 12, 13, 16)]
    assert samples == [(1, 1), (6, 6), (12, 6), (13, 1), (16, 8)]


@pytest.mark.parametrize("family", ["gpt", "t5"])
def test_the_loop_neither_gathers_nor_copies_a_cache(family):
    model, params, inputs = built(family)
    settings, room = loop.without_lengths(merge({"num_beams": 4, "eos_token_id": 2})), 40
    filled = prompts.fill_up(inputs, loop.prompt_names(model), 0, 0)
    number = jnp.int32(1)
    call = loop.Call(Place(number, number, jnp.int32(room), number, number), number, jax.random.key(0), number)
    text = loop.decode.lower(loop.StaticModel(model), params, filled, call, settings, room, False).compile().as_text()
    rows, columns = filled[loop.prompt_names(model)[0]].shape
    size = rows * 4 * (columns + 4 * room) * 4  # heads, places, head width
    kinds = {"gather": 0, "copy": 0, "dynamic-update-slice": 0}
    for shape, kind in re.findall(r"= f32\[([\d,]+)\]\S* (gather|copy|dynamic-update-slice)\(", text):
        kinds[kind] += math.prod(map(int, shape.split(","))) >= size
    assert kinds["gather"] == kinds["copy"] == 0 < kinds["dynamic-update-slice"]
