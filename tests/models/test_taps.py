"""What callers can read or change inside every family: taps, `embedded_delta`; without them the
program is the same."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import models, pytree
from fmjax.layers import attention, blocks

SIZE = {"width": 8, "layers": 2, "attention_heads": 2, "mlp_width": 12}
TEXT = SIZE | {"vocab_size": 11}
ROWS, LENGTH, TARGET = 2, 5, 4
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (ROWS, LENGTH)), jnp.int32)
TOKENS = {"input_ids": IDS, "attention_mask": jnp.asarray([[1, 1, 1, 1, 0], [1] * 5])}
PAIRS = TOKENS | {"decoder_input_ids": IDS[:, :TARGET]}
IMAGES = {"images": jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, 4, 4, 3)), jnp.float32)}
# Settings, heads, a batch.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, jax.Array]]] = {
    "bert": (TEXT, {"mlm": {}, "nsp": {}}, TOKENS),
    "gpt": (TEXT, {"lm": {}}, TOKENS),
    "t5": (TEXT | {"decoder_layers": 2, "head_width": 4}, {"lm": {}}, PAIRS),
    "vit": (SIZE | {"image_size": 4, "patch_size": 2}, {"classify": {}}, IMAGES),
    "electra": (TEXT | {"embedding_width": 6}, {"rtd": {}}, TOKENS),
    "llama": (TEXT, {"lm": {}}, TOKENS),
    "transformer": (TEXT, {"lm": {}}, PAIRS),
    "bart": (TEXT, {"lm": {}}, PAIRS),
}


@functools.cache
def built(family: str, **changes: Any) -> tuple[nn.Module, Any, dict[str, jax.Array]]:
    """Returns a model, parameters at random at order 0.3, and a batch."""
    settings, heads, batch = FAMILIES[family]
    model = models.family(family).build(heads=heads, **settings, **changes)
    shapes = jax.eval_shape(lambda: nn.meta.unbox(model.init(jax.random.key(0), batch)["params"]))
    rng = np.random.default_rng(0)
    return (
        model,
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes),
        batch,
    )


def text(family: str, **changes: Any) -> str:
    """Returns the lowered text of a training step's gradient."""
    model, params, batch = built(family, **changes)

    def loss(params, key):
        outputs = model.apply({"params": params}, batch, rngs={"dropout": key})
        return sum(jnp.sin(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(outputs))

    return jax.jit(jax.grad(loss)).lower(params, jax.random.key(0)).as_text()


@pytest.mark.parametrize(
    "changes", [{}, {"scan_layers": True, "remat": "dots"}], ids=["unrolled", "scanned"]
)
@pytest.mark.parametrize("family", [pytest.param("gpt", marks=pytest.mark.full), "bert", "t5", "vit"])
def test_without_the_collections_the_program_is_that_of_a_model_without_taps(
    family, changes, monkeypatch
):
    with_taps = text(family, **changes)
    for module in (attention, blocks):
        monkeypatch.setattr(module, "tap", lambda module, name, value: value)
    assert text(family, **changes) == with_taps


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_every_stack_is_tapped(family):
    model, params, batch = built(family)
    outputs, taps = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))(
        {"params": params}, batch
    )
    found = pytree.names(taps["intermediates"])
    paired = "decoder_input_ids" in batch
    stacks = (
        ["encoder", "decoder"]
        if paired
        else ["decoder" if family in ("gpt", "llama") else "encoder"]
    )
    kinds = {
        "encoder": ("hidden", "attention/weights"),
        "decoder": ("hidden", "attention/weights", *(["cross/weights"] * paired)),
    }
    assert set(found) == {
        f"{side}/layers/{index}/{kind}"
        for side in stacks
        for index in (0, 1)
        for kind in kinds[side]
    }
    last = found[f"{stacks[-1]}/layers/1/hidden"]
    assert (
        last.shape == outputs["hidden"].shape
        and found[f"{stacks[0]}/layers/0/attention/weights"].shape[1] == 2
    )
    if family in (
        "bert",
        "electra",
        "transformer",
        "bart",
    ):  # the others have a norm behind the stack
        np.testing.assert_array_equal(last, outputs["hidden"])


@pytest.mark.parametrize("family", [pytest.param("bert", marks=pytest.mark.full), "t5"])
def test_scanned_taps_and_their_gradients_are_the_unrolled_ones(family):
    results = []
    for scan in (False, True):
        model, params, batch = built(family, scan_layers=scan)

        def both(params, model=model, batch=batch):
            _, taps = model.apply(
                {"params": params}, batch, mutable=["intermediates", "perturbations"]
            )

            def loss(perturbations):
                outputs = model.apply({"params": params, "perturbations": perturbations}, batch)
                return jnp.sin(outputs["hidden"]).sum()

            return taps["intermediates"], jax.grad(loss)(taps["perturbations"])

        results.append(pytree.names(jax.jit(both)(params)))
    assert results[0].keys() == results[1].keys()
    for name, leaf in results[0].items():
        np.testing.assert_allclose(results[1][name], leaf, atol=1e-5, err_msg=name)


DELTAS = [(family, "") for family in FAMILIES] + [
    (family, "decoder_") for family in ("t5", "transformer", "bart")
]


QUICK = [("bert", ""), ("vit", ""), ("gpt", ""), ("t5", ""), ("transformer", "decoder_")]


@pytest.mark.parametrize(
    ("family", "prefix"),
    [pytest.param(*one, marks=[] if one in QUICK else pytest.mark.full) for one in DELTAS],
)
def test_a_delta_is_added_to_the_embedded_input(family, prefix):
    model, params, batch = built(family)
    name = f"{prefix}embedded_delta"
    length = TARGET if prefix else LENGTH  # an image has four patches and the class token
    zeros = jnp.zeros((ROWS, length, 8))
    output = "encoder_hidden" if "decoder_input_ids" in batch and not prefix else "hidden"
    apply = jax.jit(lambda batch: model.apply({"params": params}, batch)[output])
    plain = apply(batch)
    np.testing.assert_allclose(apply(batch | {name: zeros}), plain, atol=1e-6)
    delta = jnp.asarray(np.random.default_rng(1).normal(size=zeros.shape), jnp.float32)
    moved = apply(batch | {name: delta})
    assert np.abs(moved - plain).max() > 0.01
    if family in ("gpt", "llama", "t5", "transformer", "bart"):
        ids = f"{prefix}input_ids"
        other = (batch[ids] + 1) % 11
        table = params["embed"]["word"]["embedding"]
        # The difference of two words' rows makes one the other.
        scale = 8**0.5 if family == "transformer" else 1
        delta = scale * (table[other] - table[batch[ids]])
        np.testing.assert_allclose(
            apply(batch | {name: delta}), apply(batch | {ids: other}), atol=2e-5
        )


def test_a_delta_of_several_texts_belongs_to_each():
    model = models.family("bert").build(heads={"choice": {}}, **TEXT)
    ids = jnp.stack([IDS, IDS[::-1]], axis=1)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), {"input_ids": ids})["params"])
    apply = jax.jit(lambda batch: model.apply({"params": params}, batch)["hidden"])
    delta = jnp.asarray(np.random.default_rng(1).normal(size=(*ids.shape, 8)), jnp.float32)
    found = apply({"input_ids": ids, "embedded_delta": delta})
    for choice in (0, 1):
        one = {"input_ids": ids[:, choice][:, None], "embedded_delta": delta[:, choice][:, None]}
        np.testing.assert_allclose(apply(one)[:, 0], found[:, choice], atol=1e-6)
