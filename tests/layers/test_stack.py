"""Patterns of layers: masks, rotary tables and blocks that alternate, scanned, unrolled and by
hand, with caches and without."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import pytree
from fmjax.errors import UserError
from fmjax.layers.attention import Attention, Context
from fmjax.layers.blocks import PreNorm
from fmjax.layers.cache import empty_cache
from fmjax.layers.mask import Mask
from fmjax.layers.mlp import GatedMlp, Mlp, gelu
from fmjax.layers.norm import LayerNorm
from fmjax.layers.position import rotary
from fmjax.layers.stack import Layers, split_layers, stack, unstack_layers

KEY = jax.random.key(0)
ROWS, LENGTH, WIDTH, HEADS, HEAD_WIDTH = 2, 7, 8, 2, 4
WINDOW, BASES = 3, (10.0, 1000.0)
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def contexts(
    begin: int = 0, length: int = LENGTH, room: int = LENGTH, count: int = 2
) -> tuple[Context, ...]:
    """Returns a context with a window, one without, and so on; each has the rotary table of its
    kind."""
    positions = begin + jnp.arange(length)[None]
    kinds = [
        Context(
            mask=Mask(place=begin, causal=True, window=window),
            rotary=rotary(positions, HEAD_WIDTH, base),
            place=begin,
        )
        for window, base in zip((WINDOW, 0), BASES, strict=True)
    ]
    return tuple(kinds[index % 2] for index in range(count))


def block(mlp: type[Mlp] = Mlp, width: int = 12, dropout: float = 0.0) -> Any:
    parts = {
        "attention": partial(Attention, HEADS, HEAD_WIDTH),
        "mlp": partial(mlp, width, gelu),
        "norm": partial(LayerNorm, 1e-5),
    }
    return partial(PreNorm, dropout=dropout, **parts)


class Toy(nn.Module):
    """A decoder whose layers alternate."""

    blocks: Any
    layers: Layers

    @nn.compact
    def __call__(self, x, contexts, caches=None):
        return stack(self, self.blocks, self.layers, x, contexts, caches)


# The blocks of a pattern, the number of contexts, and that of layers, which the period need not
# divide.
PATTERNS: dict[str, tuple[Any, int, int]] = {
    "one block, two contexts": (block(), 2, 5),
    "one block, two contexts, no layers left": (block(), 2, 4),
    "two blocks, two contexts": ((block(), block(GatedMlp, 6)), 2, 5),
    "two blocks, three contexts": ((block(), block(width=5)), 3, 7),
    "more contexts than layers": (block(), 3, 2),
    "more blocks than layers": ((block(), block(width=5), block(width=3)), 3, 2),
}


def blocks_of(blocks: Any) -> tuple[Any, ...]:
    return blocks if isinstance(blocks, tuple) else (blocks,)


def randomized(model: nn.Module, x: Any, shared: Any) -> Any:
    """Returns parameters all random at order 0.3."""
    shapes = jax.eval_shape(lambda: nn.meta.unbox(model.init(KEY, x, shared)["params"]))
    return pytree.map_named(lambda name, leaf: 0.3 * draw(*leaf.shape, seed=len(name)), shapes)


def run(model: nn.Module, params: Any, x: Any, shared: Any) -> jax.Array:
    """Returns what the layers give, compiled as a whole."""
    return jax.jit(model.apply)({"params": params}, x, shared)[0]


def by_hand(blocks: Any, params: Any, x: Any, shared: tuple[Context, ...], count: int) -> Any:
    """Returns what the layers give one after the other; `params` are stacked by block."""
    several = blocks_of(blocks)[:count]
    for index in range(count):
        turn, place = divmod(index, len(several))
        own = params["layers"][str(place)] if len(several) > 1 else params["layers"]
        own = jax.tree.map(lambda leaf, turn=turn: leaf[turn], own)
        context = dataclasses.replace(shared[index % len(shared)], depth=index / max(count - 1, 1))
        x, _ = several[place]().apply({"params": own}, x, context)
    return x


QUICK = ("one block, two contexts", "two blocks, two contexts", "more blocks than layers")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.full) for name in PATTERNS]
)
def test_a_pattern_is_its_layers_in_turn(name):
    blocks, kinds, count = PATTERNS[name]
    x, shared = draw(ROWS, LENGTH, WIDTH), contexts(count=kinds)
    params = randomized(Toy(blocks, Layers(count)), x, shared)

    def with_gradient(function):
        return jax.jit(
            jax.value_and_grad(
                lambda params: (jnp.sin(out := function(params)).sum(), out), has_aux=True
            )
        )(params)

    (_, expected), gradient = with_gradient(
        lambda params: by_hand(blocks, params, x, shared, count)
    )
    unrolled = run(Toy(blocks, Layers(count)), params, x, shared)
    np.testing.assert_allclose(unrolled, expected, **TOLERANCE)
    scanned = Toy(blocks, Layers(count, True, "everything"))
    (_, found), own = with_gradient(lambda params: scanned.apply({"params": params}, x, shared)[0])
    np.testing.assert_allclose(found, expected, **TOLERANCE)
    for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-3)


def test_windows_and_rotary_bases_alternate():
    """Each kind of context is used, and by the right layers."""
    x, shared = draw(ROWS, LENGTH, WIDTH), contexts()
    params = randomized(Toy(block(), Layers(4)), x, shared)
    right = run(Toy(block(), Layers(4, scan=True)), params, x, shared)
    local, whole = shared
    for wrong in (
        (whole, local),
        (local, local),
        (whole, whole),
        (local.replace(rotary=whole.rotary), whole),
    ):
        other = run(Toy(block(), Layers(4, scan=True)), params, x, wrong)
        assert np.abs(other - right).max() > 1e-3
    # With a window, the first position reaches those within the window and no others.
    moved = x.copy()
    moved[:, 0] = draw(ROWS, WIDTH, seed=3)
    one = Toy(block(), Layers(1))
    params = randomized(one, x, local)
    change = np.abs(run(one, params, moved, local) - run(one, params, x, local))
    assert (change[:, :WINDOW].max(axis=2) > 1e-4).all() and (change[:, WINDOW:] == 0).all()


def test_parameters_have_one_stack_per_block_and_do_not_depend_on_the_choice_of_loop():
    x, shared = draw(ROWS, LENGTH, WIDTH), contexts()
    two = (block(), block(GatedMlp, 6))
    boxed = [
        jax.jit(Toy(two, Layers(5, scan)).init)(KEY, x, shared)["params"] for scan in (True, False)
    ]
    named = pytree.names(nn.meta.unbox(boxed[0]))
    assert {name.split("/")[1] for name in named} == {"0", "1"}
    assert named["layers/0/mlp/up/kernel"].shape == (3, WIDTH, 12) and named[
        "layers/1/mlp/gate/kernel"
    ].shape == (2, WIDTH, 6)
    assert boxed[0]["layers"]["1"]["mlp"]["up"]["kernel"].names == ("layers", "embed", "mlp")
    for one, other in zip(*(jax.tree.leaves(nn.meta.unbox(tree)) for tree in boxed), strict=True):
        np.testing.assert_array_equal(one, other)
    # A layer's values follow from its number, whatever the pattern.
    single = pytree.names(
        nn.meta.unbox(jax.jit(Toy(block(), Layers(5)).init)(KEY, x, shared)["params"])
    )
    np.testing.assert_array_equal(
        named["layers/0/attention/query/kernel"], single["layers/attention/query/kernel"][::2]
    )
    np.testing.assert_array_equal(
        named["layers/1/attention/query/kernel"], single["layers/attention/query/kernel"][1::2]
    )


def test_layers_are_split_in_order():
    stacks = {"0": {"a": jnp.array([0, 2, 4])}, "1": {"b": jnp.array([1, 3])}}
    each = unstack_layers({"encoder": {"layers": stacks, "norm": jnp.ones(2)}})
    assert [int(leaf) for own in each["encoder"]["layers"] for leaf in own.values()] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert each["encoder"]["norm"].shape == (2,)
    assert [int(own["a"]) for own in split_layers({"a": jnp.arange(3)})] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "scan"), [("one block, two contexts", True), ("two blocks, three contexts", False)]
)
def test_decoding_in_pieces_is_decoding_at_once(name, scan):
    blocks, kinds, count = PATTERNS[name]
    x, model = draw(ROWS, LENGTH, WIDTH), Toy(blocks, Layers(count, scan))
    params = randomized(model, x, contexts(count=kinds))
    apply = jax.jit(model.apply)
    expected, none = apply({"params": params}, x, contexts(count=kinds))
    assert none is None
    caches: Any = empty_cache(count, ROWS, 9, HEADS, HEAD_WIDTH, jnp.float32)["layers"]
    pieces = []
    for own, begin, end in (
        (params, 0, 4),
        (unstack_layers(params), 4, 5),
        (unstack_layers(params), 5, LENGTH),
    ):
        shared = contexts(begin, end - begin, 9, kinds)
        out, caches = apply({"params": own}, x[:, begin:end], shared, caches)
        pieces.append(out)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), expected, **TOLERANCE)
    # The caches are those of the layers in order: the first layer's keys are those of x itself.
    first = split_layers(params["layers"])[0]
    normed = LayerNorm(1e-5).apply({"params": first["attention_norm"]}, x)
    values = jnp.einsum("bld,dhk->bhlk", normed, first["attention"]["value"]["kernel"])
    values += first["attention"]["value"]["bias"][None, :, None]
    np.testing.assert_allclose(caches[0]["attention"]["value"][:, :, :LENGTH], values, **TOLERANCE)
    assert len(caches) == count


@pytest.mark.parametrize(
    "blocks", [block(dropout=0.3), (block(dropout=0.3), block(GatedMlp, 6, 0.3))]
)
def test_scanned_and_unrolled_patterns_drop_the_same(blocks):
    x, shared = draw(ROWS, LENGTH, WIDTH), contexts()
    params = {"params": randomized(Toy(blocks, Layers(5)), x, shared)}
    scanned, unrolled = (
        jax.jit(Toy(blocks, Layers(5, scan)).apply)(params, x, shared, rngs={"dropout": KEY})[0]
        for scan in (True, False)
    )
    np.testing.assert_allclose(scanned, unrolled, **TOLERANCE)
    plain = run(Toy(blocks, Layers(5)), params["params"], x, shared)
    assert np.abs(unrolled - plain).max() > 1e-3


def test_unknown_policies_are_refused_by_name():
    with pytest.raises(
        UserError,
        match=r'model\.remat="dot": no such policy \(did you mean "dots"\?\); choose one of none',
    ):
        Toy(block(), Layers(1, remat="dot")).init(KEY, draw(1, 2, WIDTH), Context())
