"""Logits in chunks, from the setting to the step: what trains, what is evaluated, what a plan counts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cases import case

from fmjax import models, tasks
from fmjax.errors import UserError
from fmjax.layers.vocabulary import VocabularyLogits
from fmjax.models.sizes import with_chunks
from fmjax.planning.plan import plan
from fmjax.planning.report import table
from fmjax.planning.topology import read_topology
from fmjax.train.chunks import for_loss
from fmjax.train.wrappers import mix

HEADS = {"bert": "mlm", "gpt": "lm", "llama": "lm", "t5": "lm", "transformer": "lm", "bart": "lm"}


def with_rows(model: Any, rows: int) -> Any:
    return model.clone(settings=dataclasses.replace(model.settings, loss_chunk=rows))


def value_and_predictions(model: Any, task: Any, params: Any, batch: Any) -> tuple[jax.Array, Any, Any]:
    def loss(params: Any) -> jax.Array:
        return sum(task.loss(model.apply({"params": params}, batch), batch).values(), jnp.float32(0))

    return *jax.value_and_grad(loss)(params), task.predictions(model.apply({"params": params}, batch), batch)


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.full), "transformer"])
def test_a_model_has_the_same_loss_gradients_and_predictions(family, tmp_path):
    """Llama has a kernel of its own, and the Transformer a bias and label smoothing."""
    found = case(family, tmp_path)
    built, batch = found.experiment.built, found.batches[0]
    batch = {name: batch[name] for name in found.experiment.abstract.spec}
    params = jax.jit(lambda: built.model.init(jax.random.key(0), built.model.one_row_batch())["params"])()
    later = for_loss(with_rows(built.model, 7), built.task)

    @jax.jit
    def both(params: Any, batch: Any) -> Any:
        return [value_and_predictions(model, built.task, params, batch) for model in (built.model, later)]

    expected, chunked = both(jax.tree.map(lambda leaf: leaf, params), batch)
    np.testing.assert_allclose(chunked[0], expected[0], rtol=2e-6)
    for path, gradient in jax.tree_util.tree_leaves_with_path(expected[1]):
        wrong = jnp.abs(dict(jax.tree_util.tree_leaves_with_path(chunked[1]))[path] - gradient).max()
        assert wrong <= 1e-5 * max(1, jnp.abs(gradient).max()), path
    for name, array in expected[2].items():
        np.testing.assert_allclose(chunked[2][name], array, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", HEADS)
def test_every_family_has_chunks(family):
    model = models.family(family).build(heads={HEADS[family]: {}}, size="tiny", vocab_size=40, loss_chunk=1)
    batch = {name: jnp.zeros((1, 2), jnp.int32) for name in model.one_row_batch()}
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
    assert with_chunks(model, ["another"]) is model
    found = jax.eval_shape(with_chunks(model, [HEADS[family]]).apply, variables, batch)
    assert isinstance(found[HEADS[family]], VocabularyLogits) and found[HEADS[family]].shape == (1, 2, 40)


def test_parts_of_a_mixture_have_their_own_chunks():
    parts = {"mlm": {"name": "mlm"}, "classify": {"name": "classify", "labels": ("no", "yes")}}
    task = tasks.make({"name": "mixture", "parts": parts})
    model = models.family("bert").build(heads=task.heads, size="tiny", vocab_size=40, loss_chunk=5)
    mixed = mix(model, task)
    assert for_loss(mixed, task).parts["mlm"].heads["mlm"]["chunk"] == 5
    assert for_loss(mixed, task, {"mlm": {"mlm": 7}}).parts["mlm"].heads["mlm"]["chunk"] == 7
    assert for_loss(mixed, task, {}).parts["mlm"] == mixed.parts["mlm"]
    assert for_loss(mixed, task).parts["classify"] == mixed.parts["classify"]


def test_a_number_of_rows_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"model\.loss_chunk=-2.*0 chooses by size"):
        models.family("gpt").build(heads={}, vocab_size=40, loss_chunk=-2)


def test_a_plan_counts_a_chunk_and_says_so(tmp_path):
    config, topology = case("gpt", tmp_path).config, read_topology("cpu:8")
    sized = {rows: plan(config | {"model": config["model"] | {"loss_chunk": rows}}, topology) for rows in (-1, 4)}
    assert not sized[-1]["chunked_logits"] and "logits of" not in table(sized[-1])
    rows = config["data"]["batch_size"] * config["data"]["max_length"] // 8
    line = sized[4]["chunked_logits"]["lm"]
    assert line == {"chunk": 4 * 4 * 1024, "whole": 4 * rows * 1024, "rows": 4}
    assert "logits of lm: 4 rows at once" in table(sized[4])
    activations = [sized[rows]["bytes_per_device"]["activations"] for rows in (-1, 4)]
    # A chunk and the gradient of the table are kept instead.
    assert activations[0] - activations[1] > line["whole"] / 2
