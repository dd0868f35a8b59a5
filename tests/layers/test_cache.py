"""What decoders need of the layers: positions, shared key heads, other norms and gates, and a cache that changes nothing."""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.layers import position
from fmjax.layers.attention import (
    Attention,
    Context,
    CrossAttention,
    rotate,
)
from fmjax.layers.blocks import PostNorm, PreNorm
from fmjax.layers.kernels.plain import attend
from fmjax.layers.mask import Mask, causal_mask
from fmjax.layers.mlp import GatedMlp, Mlp, gelu
from fmjax.layers.norm import LayerNorm, RmsNorm
from fmjax.layers.stack import Layers, stack

KEY = jax.random.key(0)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def randomised(layer: nn.Module, *args):
    """Returns parameters all random at order 0.3."""
    boxed = nn.meta.unbox(jax.eval_shape(layer.init, KEY, *args)["params"])
    leaves, structure = jax.tree.flatten(boxed)
    return jax.tree.unflatten(structure, [0.3 * draw(*leaf.shape, seed=seed) for seed, leaf in enumerate(leaves)])


def still(weights: jax.Array) -> jax.Array:
    return weights


def test_shared_key_heads_are_those_of_repeated_ones():
    q, k, v, mask = draw(2, 3, 6, 4), draw(2, 3, 2, 4, seed=1), draw(2, 3, 2, 4, seed=2), causal_mask(3, 3)
    repeated = (np.repeat(array, 3, axis=2) for array in (k, v))
    np.testing.assert_allclose(attend(q, k, v, mask, still), attend(q, *repeated, mask, still), atol=1e-6)


def test_bias_and_scale_enter_the_scores():
    q, k, v, bias = draw(2, 3, 2, 4), draw(2, 5, 2, 4, seed=1), draw(2, 5, 2, 4, seed=2), draw(1, 2, 3, 5, seed=3)
    scores = np.einsum("blhk,bshk->bhls", q, k) * 0.7 + bias
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bhls,bshk->blhk", weights, v)
    np.testing.assert_allclose(attend(q, k, v, None, still, 0.7, jnp.array(bias)), expected, atol=2e-6)


def test_causal_masks():
    assert np.asarray(causal_mask(3, 3))[0, 0].tolist() == np.tril(np.ones((3, 3), bool)).tolist()
    later = np.asarray(causal_mask(2, 6, place=3))[0, 0]
    assert later.tolist() == [[True] * 4 + [False] * 2, [True] * 5 + [False]]
    near = np.asarray(causal_mask(2, 6, place=3, window=2))[0, 0]
    assert near.tolist() == [[False] * 2 + [True] * 2 + [False] * 2, [False] * 3 + [True] * 2 + [False]]


def test_rotary_scores_depend_on_distance_alone():
    q, k = draw(1, 1, 1, 8), draw(1, 1, 1, 8, seed=1)

    def score(at: int, other: int) -> float:
        turned = (rotate(x, position.rotary(jnp.array([[place]]), 8, 100.0)) for x, place in ((q, at), (k, other)))
        return float(jnp.vdot(*turned))

    assert score(7, 3) == pytest.approx(score(14, 10), abs=1e-5) != pytest.approx(score(7, 4), abs=1e-3)
    cos, sin = position.rotary(jnp.array([[2]]), 4, 100.0)
    np.testing.assert_allclose(cos[0, 0], [math.cos(2), math.cos(0.2)], rtol=1e-6)
    np.testing.assert_allclose(sin[0, 0], [math.sin(2), math.sin(0.2)], rtol=1e-6)


def test_sinusoids_by_hand():
    table = position.sinusoids(5, 4)
    expected = [[math.sin(p), math.sin(p / 100), math.cos(p), math.cos(p / 100)] for p in range(5)]
    np.testing.assert_allclose(table, expected, atol=1e-7)


def test_relative_buckets_by_hand():
    both = position.relative_buckets(jnp.arange(-20, 21), True, 8, 16).tolist()
    # Half the buckets a direction: distances 0 and 1 alone, then one for 2 to 5 and one for all beyond, as 2 * 8^(1/2) = 5.7.
    behind = [0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3]
    assert both[20::-1] == behind and both[21:] == [4 + bucket for bucket in behind[1:]]
    one = position.relative_buckets(jnp.arange(-20, 21), False, 8, 16).tolist()
    assert one[20:] == [0] * 21
    # Distances 0 to 3 alone, then 4 + 4 log(d / 4) / log 4, rounded down.
    assert one[20::-1] == [d if d < 4 else min(7, 4 + int(4 * math.log(d / 4, 4))) for d in range(21)]


def test_rms_norm_and_gates_by_hand():
    x, norm, mlp = draw(2, 3, 8), RmsNorm(0.5), GatedMlp(5, gelu, use_bias=False)
    p = randomised(norm, x)
    np.testing.assert_allclose(
        norm.apply({"params": p}, x), x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 0.5) * p["scale"], atol=1e-6
    )
    p = randomised(mlp, x)
    assert {name: list(leaf) for name, leaf in p.items()} == {name: ["kernel"] for name in ("gate", "up", "down")}
    hidden = np.asarray(gelu(x @ p["gate"]["kernel"])) * (x @ p["up"]["kernel"])
    np.testing.assert_allclose(mlp.apply({"params": p}, x), hidden @ p["down"]["kernel"], atol=1e-5)


def test_biases_are_those_that_are_named():
    x = draw(1, 2, 8)
    p = randomised(Attention(4, 2, kv_heads=2, biased=("query", "value")), x, Context())
    assert {name for name, leaf in p.items() if "bias" in leaf} == {"query", "value"}
    assert p["key"]["kernel"].shape == (8, 2, 2) and p["query"]["kernel"].shape == (8, 4, 2)


class Decoder(nn.Module):
    """Two layers with a cross-attention."""

    block: type[nn.Module]
    scan: bool

    @nn.compact
    def __call__(self, x, context, caches=None):
        parts = {
            "attention": partial(Attention, 4, 2, kv_heads=2),
            "cross": partial(CrossAttention, 2, 4),
            "mlp": partial(Mlp, 12, gelu),
            "norm": partial(LayerNorm, 1e-5),
        }
        return stack(self, partial(self.block, **parts), Layers(2, self.scan), x, context, caches)


@pytest.mark.parametrize(("block", "scan"), [(PreNorm, False), (PostNorm, True)])
def test_decoding_in_pieces_with_a_cache_is_decoding_at_once(block, scan):
    x, memory = draw(2, 7, 8), draw(2, 5, 8, seed=1)
    memory_mask, keys = Mask(jnp.array([[1, 1, 1, 0, 0], [1] * 5], bool)), jnp.array([[1] * 7, [0, 0] + [1] * 5])
    places = jnp.maximum(jnp.cumsum(keys, axis=1) - 1, 0)
    rotary = position.rotary(places, 2, 10.0)
    shared = Context(memory=jnp.array(memory), memory_mask=memory_mask)
    model = Decoder(block, scan)
    whole = shared.replace(mask=Mask(keys.astype(bool), causal=True), rotary=rotary)
    params = {"params": randomised(model, x, whole)}
    apply = jax.jit(model.apply)
    expected, _ = apply(params, x, whole)

    empty = jnp.zeros((2, 2, 9, 2))  # rows, key heads, places, head width
    caches = ({"attention": {"key": empty, "value": empty}},) * 2
    room = jnp.pad(keys, ((0, 0), (0, 2)))
    pieces = []
    for begin, end in ((0, 4), (4, 5), (5, 7)):
        piece = shared.replace(
            mask=Mask(room.astype(bool), place=begin, causal=True),
            rotary=tuple(part[:, begin:end] for part in rotary),
            place=jnp.int32(begin),
            memory=None if begin else shared.memory,
        )
        out, caches = apply(params, x[:, begin:end], piece, caches)
        pieces.append(out)
    real = np.asarray(keys, bool)  # what stands at padding is of no use to anyone
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1)[real], expected[real], atol=2e-6)
    assert [layer["cross"]["key"].shape for layer in caches] == [(2, 2, 5, 4)] * 2


def test_a_block_normalises_what_each_part_reads():
    x = draw(2, 3, 8)
    parts = {
        "attention": partial(Attention, 2, 4),
        "cross": partial(CrossAttention, 2, 4),
        "mlp": partial(Mlp, 12, gelu),
        "norm": partial(LayerNorm, 1e-5),
    }
    context, block = Context(memory=jnp.array(draw(2, 4, 8, seed=1))), PreNorm(**parts)
    p = randomised(block, x, context)
    y = x
    for name in ("attention", "cross", "mlp"):
        read = parts["norm"]().apply({"params": p[f"{name}_norm"]}, y)
        given = (read,) if name == "mlp" else (read, context)
        out = parts[name]().apply({"params": p[name]}, *given)
        y = y + (out if name == "mlp" else out[0])
    np.testing.assert_allclose(block.apply({"params": p}, x, context)[0], y, atol=1e-6)
