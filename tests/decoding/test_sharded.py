"""Generation on a mesh: its tokens are those of one device, and no step gathers the table or the logits."""

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
from fmjax.decoding.settings import merge
from fmjax.distributed import sharding
from fmjax.distributed.layout import Layout
from fmjax.train.state import abstract_params

VOCABULARY, WIDTH, ROWS, MOST = 4096, 64, 8, 6
LAYOUTS = {"fsdp_tp": {"fsdp": 2, "tensor": 4}, "fsdp": {"fsdp": 8}}
GATHER = r"= \(?f32\[([\d,]+)\]\S* all-gather(?:-start)?\("


@pytest.mark.parametrize("rules", LAYOUTS)
@pytest.mark.parametrize("beams", [1, 4])
def test_a_divided_vocabulary_is_read_where_it_is(rules, beams):
    sizes = {
        "width": WIDTH,
        "layers": 1,
        "attention_heads": 4,
        "mlp_width": 32,
        "vocab_size": VOCABULARY,
        "positions": 32,
    }
    model: Any = models.family("gpt").build(heads={"lm": {}}, **sizes)
    rng, layout = (
        np.random.default_rng(3),
        Layout(sharding.make_mesh(LAYOUTS[rules]), sharding.RULES[rules]),
    )
    inputs = {
        "input_ids": rng.integers(3, VOCABULARY, (ROWS, 4)),
        "attention_mask": np.ones((ROWS, 4), np.int32),
    }
    spec = {name: jax.ShapeDtypeStruct(array.shape, np.int32) for name, array in inputs.items()}
    abstract = abstract_params(model, spec, layout.mesh, layout.rules)
    shapes = nn.meta.unbox(
        jax.eval_shape(model.init, jax.random.key(0), model.one_row_batch())["params"]
    )
    params = jax.tree.map(
        lambda leaf: (0.5 * rng.normal(size=leaf.shape)).astype(np.float32), shapes
    )
    how = {"num_beams": beams, "num_return_sequences": beams}
    settings = merge({"max_new_tokens": MOST, "eos_token_id": 2, "pad_token_id": 0}, how)
    expected = loop.continuations(model, params, inputs, settings, with_scores=True)
    placed = jax.tree.map(lambda leaf, at: jax.device_put(leaf, at.sharding), params, abstract)
    filled, number = (
        prompts.fill_up(inputs, loop.prompt_names(model), 0, sizes["positions"]),
        jnp.int32(1),
    )
    call = loop.Call(
        Place(number, number, jnp.int32(MOST), number, number), number, jax.random.key(0), number
    )
    with layout.active():
        found = loop.continuations(model, placed, inputs, settings, with_scores=True)
        lowered = loop.decode.lower(
            loop.StaticModel(model), placed, filled, call, loop.without_lengths(settings), 8, True
        )
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=1e-4)
    text = lowered.compile().as_text()
    [(carried, body)] = re.findall(r"= (\(.*\)) while\(.*body=%?([\w.\-]+).*/while", text)
    # Neither is the table gathered before the loop, and whole in it.
    sizes_carried = [
        math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", carried)
    ]
    step = re.search(rf"^%?{re.escape(body)} \(.*?^}}", text, re.DOTALL | re.MULTILINE)[0]
    gathered = [math.prod(map(int, shape.split(","))) for shape in re.findall(GATHER, step)]
    assert max(sizes_carried) <= VOCABULARY * WIDTH // 8
    assert max(gathered, default=0) < min(VOCABULARY * WIDTH // 2, ROWS * beams * VOCABULARY)
