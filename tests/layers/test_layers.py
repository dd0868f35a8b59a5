"""Layers against their definitions in plain numpy: products, attention, activations, norms, and how they are stacked."""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.errors import UserError
from fmjax.layers.attention import Attention, Context, CrossAttention
from fmjax.layers.blocks import PostNorm
from fmjax.layers.heads import FEW, ClassifyMean, MaskedLm, project_to_vocabulary
from fmjax.layers.kernels.plain import attend
from fmjax.layers.linear import Dense, embedding, normal, product
from fmjax.layers.mask import Mask, key_mask, segment_mask
from fmjax.layers.mlp import ACTIVATIONS, Mlp, activation, gelu
from fmjax.layers.norm import LayerNorm
from fmjax.layers.stack import Layers, stack

KEY = jax.random.key(0)


def still(weights: jax.Array) -> jax.Array:
    """Dropout that drops nothing."""
    return weights


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def randomised(module: nn.Module, *inputs: object) -> dict:
    """Returns parameters like the module's, all at random: at initialisation a bias could be dropped unnoticed."""
    shapes = nn.meta.unbox(jax.eval_shape(lambda: module.init(KEY, *inputs)))["params"]
    leaves, structure = jax.tree.flatten(shapes)
    return jax.tree.unflatten(structure, [0.5 * draw(*leaf.shape, seed=seed) for seed, leaf in enumerate(leaves, start=1)])


@pytest.mark.parametrize(
    ("inputs", "features", "axes", "equation"),
    [
        ((2, 3, 4), (5,), ("embed", "mlp"), "bld,df->blf"),
        ((2, 3, 4), (2, 6), ("embed", "heads", "kv"), "bld,dhk->blhk"),
        ((2, 3, 2, 4), (5,), ("heads", "kv", "embed"), "blhk,hkd->bld"),
        ((3, 4), (5,), ("embed", None), "bd,df->bf"),
    ],
)
def test_dense_is_the_einsum_of_full_rank_kernels(inputs, features, axes, equation):
    x, layer = draw(*inputs), Dense(features, axes)
    params = randomised(layer, x)
    assert params["kernel"].shape == inputs[len(inputs) - len(axes) + len(features) :] + features
    assert params["bias"].shape == features
    expected = np.einsum(equation, x, params["kernel"]) + params["bias"]
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, atol=1e-5)
    bare = Dense(features, axes, use_bias=False).apply({"params": {"kernel": params["kernel"]}}, x)
    np.testing.assert_allclose(bare, expected - params["bias"], atol=1e-5)
    assert layer.init(KEY, x)["params"]["kernel"].names == axes


def plain_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Attention row by row in fp64, over the keys that the mask [B,H,L,S] leaves."""
    out = np.zeros(q.shape)
    for b, h, i in np.ndindex(q.shape[0], q.shape[2], q.shape[1]):
        keep = mask[b, h, i]
        scores = k[b, keep, h].astype(np.float64) @ q[b, i, h] / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights / weights.sum() @ v[b, keep, h]
    return out


@pytest.mark.parametrize("kind", ["none", "keys", "segments", "any"])
def test_attention_is_a_softmax_over_the_unmasked(kind):
    q, k, v = (draw(2, 4, 3, 5, seed=seed) for seed in range(3))
    keys = np.array([[1, 1, 0, 1], [1, 0, 0, 0]])
    segments = np.array([[1, 1, 2, 2], [1, 1, 1, 0]])
    anything = np.random.default_rng(0).random((2, 3, 4, 4)) < 0.5
    anything[..., 0] = True
    mask = {"none": None, "keys": key_mask(jnp.array(keys)), "segments": segment_mask(jnp.array(segments)), "any": anything}[kind]
    full = np.broadcast_to(True if mask is None else np.asarray(mask), (2, 3, 4, 4))
    if kind == "keys":
        assert (full == (keys[:, None, None, :] == 1)).all()
    if kind == "segments":
        assert full[0, 0].astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    out = attend(jnp.array(q), jnp.array(k), jnp.array(v), mask, still)
    np.testing.assert_allclose(out, plain_attention(q, k, v, full), atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_row_that_may_attend_to_nothing_averages(dtype):
    q, k, v = (jnp.array(draw(1, 3, 2, 4, seed=seed), dtype) for seed in range(3))
    mask = key_mask(jnp.zeros((1, 3), jnp.int32))
    out = attend(q, k, v, mask, still)
    mean = np.asarray(v, np.float32).mean(axis=1, keepdims=True)
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(np.asarray(out, np.float32), np.broadcast_to(mean, out.shape), atol=tolerance)
    gradient = jax.grad(lambda v: attend(q, k, v, mask, still).astype(jnp.float32).sum())(v)
    assert np.isfinite(np.asarray(gradient, np.float32)).all()


def test_attention_projects_to_heads_and_back():
    x, memory = draw(2, 3, 8), draw(2, 5, 8, seed=1)
    p = randomised(Attention(2, 4), x, Context())
    assert {name: leaf["kernel"].shape for name, leaf in p.items()} == {
        "query": (8, 2, 4), "key": (8, 2, 4), "value": (8, 2, 4), "out": (2, 4, 8),
    }  # fmt: skip
    for source in (None, memory):
        s = x if source is None else source
        q, k, v = (
            np.einsum("bld,dhk->blhk", y, p[name]["kernel"]) + p[name]["bias"]
            for y, name in ((x, "query"), (s, "key"), (s, "value"))
        )
        everything = np.ones((2, 2, x.shape[1], s.shape[1]), bool)
        expected = np.einsum("blhk,hkd->bld", plain_attention(q, k, v, everything), p["out"]["kernel"]) + p["out"]["bias"]
        layer, context = (Attention, Context()) if source is None else (CrossAttention, Context(memory=memory))
        np.testing.assert_allclose(layer(2, 4).apply({"params": p}, x, context)[0], expected, atol=1e-5)


def test_positions_are_added_to_queries_and_keys_alone():
    x, memory = jnp.array(draw(2, 3, 8)), jnp.array(draw(2, 5, 8, seed=1))
    own, far = jnp.array(draw(1, 3, 8, seed=2)), jnp.array(draw(2, 5, 8, seed=3))
    p = randomised(Attention(2, 4), x, Context())

    def project(y, name):
        return np.einsum("bld,dhk->blhk", y, p[name]["kernel"]) + p[name]["bias"]

    for layer, context, keys, values in (
        (Attention, Context(positions=own), x + own, x),
        (CrossAttention, Context(memory=memory, positions=own, memory_positions=far), memory + far, memory),
    ):
        everything = np.ones((2, 2, 3, keys.shape[1]), bool)
        seen = plain_attention(project(x + own, "query"), project(keys, "key"), project(values, "value"), everything)
        expected = np.einsum("blhk,hkd->bld", seen, p["out"]["kernel"]) + p["out"]["bias"]
        np.testing.assert_allclose(layer(2, 4).apply({"params": p}, x, context)[0], expected, atol=1e-5)
    with pytest.raises(ValueError, match="needs a memory, or a cache"):
        CrossAttention(2, 4).apply({"params": p}, x, Context())


def test_attention_drops_only_with_a_key():
    x, layer = draw(1, 4, 8), Attention(2, 4, dropout=0.5)
    params = {"params": randomised(layer, x, Context())}
    keys = ({}, {"dropout": KEY}, {"dropout": KEY}, {"dropout": jax.random.key(1)})
    calm, first, again, other = (layer.apply(params, x, Context(), rngs=rngs)[0] for rngs in keys)
    assert np.array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3 and np.abs(first - calm).max() > 1e-3
    np.testing.assert_array_equal(calm, layer.clone(dropout=0.0).apply(params, x, Context())[0])


def test_gelu_is_the_exact_one():
    x = np.linspace(-6, 6, 401, dtype=np.float32)
    exact = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.astype(np.float64)]
    np.testing.assert_allclose(gelu(jnp.array(x)), exact, atol=1e-6)
    np.testing.assert_allclose(activation("gelu")(jnp.array(x)), exact, atol=1e-6)
    tanh = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x.astype(np.float64)]
    np.testing.assert_allclose(activation("gelu_new")(jnp.array(x)), tanh, atol=1e-6)
    assert np.abs(np.array(exact) - tanh).max() > 1e-4


def test_unknown_activations_are_refused_by_name():
    with pytest.raises(UserError, match=r'"gelo" is not known \(did you mean "gelu"\?\).*relu'):
        activation("gelo")
    assert np.asarray(ACTIVATIONS["swish"](jnp.float32(2))) == pytest.approx(2 / (1 + math.exp(-2)))


def test_mlp_is_down_of_the_activation_of_up():
    x, layer = draw(2, 3, 4), Mlp(6, gelu)
    p = randomised(layer, x)
    up = x @ p["up"]["kernel"] + p["up"]["bias"]
    expected = np.asarray(gelu(jnp.array(up))) @ p["down"]["kernel"] + p["down"]["bias"]
    np.testing.assert_allclose(layer.apply({"params": p}, x), expected, atol=1e-5)


@pytest.mark.parametrize(("mean", "spread", "tolerance"), [(0, 1, 1e-5), (1e4, 1, 5e-3), (0, 1e-3, 1e-4)])
def test_layer_norm_keeps_its_digits(mean, spread, tolerance):
    x, layer = (mean + spread * draw(3, 5, 64)).astype(np.float32), LayerNorm(1e-12)
    p = randomised(layer, x)
    wide = x.astype(np.float64)
    deviation = wide - wide.mean(-1, keepdims=True)
    expected = deviation / np.sqrt(np.square(deviation).mean(-1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]
    np.testing.assert_allclose(layer.apply({"params": p}, x), expected, atol=tolerance)


def test_layer_norm_adds_epsilon_to_the_variance():
    x = draw(2, 8)
    p = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
    out = LayerNorm(3.0).apply({"params": p}, x)
    np.testing.assert_allclose(out, (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 3), atol=1e-6)


BLOCK = {"attention": partial(Attention, 2, 4), "mlp": partial(Mlp, 12, gelu), "norm": partial(LayerNorm, 1e-12)}


class Small(nn.Module):
    """A block that compiles in no time."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, context, cache=None):
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        return jnp.tanh(x + context.bias + drop(Dense((8,), ("embed", "mlp"), name="up")(x))), cache


class Tower(nn.Module):
    """Three blocks, stacked."""

    scan: bool
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, shift):
        return stack(self, partial(Small, self.dropout), Layers(3, self.scan), x, Context(bias=shift))[0]


def test_a_block_normalises_after_each_residual_sum():
    x, context = draw(2, 3, 8), Context(mask=Mask(jnp.array([[1, 1, 0], [1, 1, 1]], bool)))
    parts = {name: make() for name, make in BLOCK.items()}
    block = PostNorm(**BLOCK)
    p = randomised(block, x, context)
    seen = parts["attention"].apply({"params": p["attention"]}, x, context)[0]
    y = parts["norm"].apply({"params": p["attention_norm"]}, x + seen)
    y = parts["norm"].apply({"params": p["mlp_norm"]}, y + parts["mlp"].apply({"params": p["mlp"]}, y))
    np.testing.assert_allclose(block.apply({"params": p}, x, context)[0], y, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_scanned_and_unrolled_stacks_are_the_same(dropout):
    x, shift = draw(2, 4, 8), draw(2, 1, 8, seed=1)
    rngs = {"dropout": KEY} if dropout else {}
    params = randomised(Tower(False), x, shift)

    def run(scan: bool):
        def loss(params):
            out = Tower(scan, dropout).apply({"params": params}, x, shift, rngs=rngs)
            return jnp.sin(out).sum(), out

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    (scanned, out), (unrolled, expected) = run(True), run(False)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for one, other in zip(jax.tree.leaves(scanned), jax.tree.leaves(unrolled), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)
    if dropout:
        calm = Tower(False).apply({"params": params}, x, shift)
        assert np.abs(calm - expected).max() > 0.05


def test_layers_are_initialised_apart_and_the_same_whichever_way_they_run():
    x = draw(1, 2, 8)
    boxed = [Tower(scan).init(KEY, x, x)["params"] for scan in (True, False)]
    first, second = (jax.tree.leaves(nn.meta.unbox(tree)) for tree in boxed)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    kernel = boxed[0]["layers"]["up"]["kernel"]
    assert kernel.names == ("layers", "embed", "mlp") and kernel.value.shape == (3, 8, 8)
    assert not np.isclose(kernel.value[0], kernel.value[1]).any()
    assert float(kernel.value.std()) == pytest.approx(0.02, rel=0.2)  # not shrunk by a fan-in over the layers


def test_layers_apply_their_own_parameters_in_order():
    x, shift = draw(2, 4, 8), draw(2, 1, 8, seed=1)
    params = randomised(Tower(True), x, shift)
    y = x
    for layer in range(3):
        own = jax.tree.map(lambda leaf, i=layer: leaf[i], params["layers"])
        y = np.tanh(y + shift + y @ own["up"]["kernel"] + own["up"]["bias"])
    np.testing.assert_allclose(Tower(True).apply({"params": params}, x, shift), y, atol=1e-5)


class Marks(nn.Module):
    """A block that writes which of 64 numbers dropout leaves, one binary digit a layer."""

    @nn.compact
    def __call__(self, x, context, cache=None):
        weight = self.param("weight", nn.with_logical_partitioning(nn.initializers.ones_init(), (None,)), (1,))
        kept = nn.Dropout(0.5, deterministic=False)(jnp.ones_like(x)) > 0
        return 2 * x + kept * weight, cache


@pytest.mark.parametrize("scan", [False, True])
def test_each_layer_drops_something_else(scan):
    class Three(nn.Module):
        @nn.compact
        def __call__(self, x):
            return stack(self, Marks, Layers(3, scan), x, Context())[0]

    params = {"params": {"layers": {"weight": jnp.ones((3, 1))}}}
    digits = np.asarray(Three().apply(params, jnp.zeros(64), rngs={"dropout": KEY})).astype(int)
    layers = [(digits >> bit) & 1 for bit in range(3)]
    assert all(10 < layer.sum() < 54 for layer in layers)
    assert all((layers[a] != layers[b]).sum() > 10 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_bf16_computes_near_fp32_with_fp32_parameters():
    x, context = draw(2, 4, 8), Context(mask=Mask(jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)))
    low = PostNorm(**{name: partial(make, dtype=jnp.bfloat16) for name, make in BLOCK.items()})
    assert {leaf.dtype for leaf in jax.tree.leaves(low.init(KEY, jnp.array(x, jnp.bfloat16), context))} == {jnp.dtype("float32")}
    params = {"params": randomised(PostNorm(**BLOCK), x, context)}
    out = low.apply(params, jnp.array(x, jnp.bfloat16), context)[0]
    expected = PostNorm(**BLOCK).apply(params, x, context)[0]
    assert out.dtype == jnp.bfloat16
    error = np.abs(np.asarray(out, np.float32) - np.asarray(expected))
    assert 1e-5 < error.max() < 0.15 and error.mean() < 0.03  # values of order 1, with 8 bits


def test_heads_give_fp32_logits_whatever_the_compute_type():
    features = {"hidden": jnp.array(draw(2, 4, 8), jnp.bfloat16), "word_table": jnp.array(draw(11, 8, seed=1))}
    head = MaskedLm(gelu, 1e-12, dtype=jnp.bfloat16)
    places = {"masked_positions": jnp.array([[0, 3, 0], [2, 1, 1]])}
    params = {"params": randomised(head, features, {})}
    everywhere, there = head.apply(params, features, {}), head.apply(params, features, places)
    assert everywhere.dtype == there.dtype == jnp.float32
    assert everywhere.shape == (2, 4, 11) and there.shape == (2, 3, 11)
    gathered = np.take_along_axis(np.asarray(everywhere), np.asarray(places["masked_positions"])[:, :, None], axis=1)
    np.testing.assert_allclose(there, gathered, atol=1e-5)


def test_classify_mean_is_a_weighted_mean():
    hidden, weights = draw(2, 3, 4), np.array([[1, 0, 3], [0, 0, 0]], np.float32)
    head = ClassifyMean(classes=2)
    batch = {"pool_weights": jnp.array(weights)}
    p = randomised(head, {"hidden": hidden}, batch)
    mean = np.stack([(hidden[0, 0] + 3 * hidden[0, 2]) / 4, np.zeros(4, np.float32)])
    np.testing.assert_allclose(
        head.apply({"params": p}, {"hidden": jnp.array(hidden)}, batch), mean @ p["kernel"] + p["bias"], atol=1e-5
    )


def test_embedding_rows_are_looked_up_and_named():
    layer = embedding(5, 3, axis="vocab", init=normal(0.02), dtype=jnp.float32)
    table = layer.init(KEY, jnp.array([0]))["params"]["embedding"]
    assert table.names == ("vocab", "embed") and table.value.shape == (5, 3)
    found = layer.apply({"params": {"embedding": table.value}}, jnp.array([[4, 0]]))
    np.testing.assert_array_equal(found, table.value[np.array([[4, 0]])])


@pytest.mark.parametrize(("rows", "turned"), [(1024, False), (1100, True)])
def test_gradients_of_a_product(rows, turned):
    """They are those of `@`; a great x is turned first on a CPU, and nowhere else."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(rows, 256), (256, 8), (rows, 8)]
    x, kernel, weights = (jax.random.normal(key, shape) / 16 for key, shape in zip(keys, shapes, strict=True))
    gradients = jax.grad(lambda function, x, kernel: (function(x, kernel) * weights).sum(), argnums=(1, 2))
    own, plain = (gradients(function, x, kernel) for function in (product, jnp.matmul))
    for ours, theirs in zip(own, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    traced = jax.jit(gradients, static_argnums=0).trace(product, x, kernel)
    assert ("optimization_barrier" in traced.lower(lowering_platforms=("cpu",)).as_text()) is turned
    for platform in ("tpu", "cuda"):
        assert "optimization_barrier" not in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("rows", [1, FEW[0], FEW[-1], FEW[-1] + 1])
def test_projection_to_a_vocabulary(rows):
    """They and their gradients are those of x @ table.T; few rows are taken the other way round on a CPU, and nowhere else."""
    keys = jax.random.split(KEY)
    x, table = (jax.random.normal(key, (count, 16)) / 4 for key, count in zip(keys, (rows, 40), strict=True))
    np.testing.assert_allclose(project_to_vocabulary(x, table), x @ table.T, rtol=0, atol=1e-6)
    functions = project_to_vocabulary, lambda x, t: x @ t.T
    own, plain = (jax.grad(lambda x, t, f=f: (f(x, t) ** 2).sum(), (0, 1))(x, table) for f in functions)
    for ours, theirs in zip(own, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    traced = jax.jit(project_to_vocabulary).trace(x, table)
    assert ("optimization_barrier" in traced.lower(lowering_platforms=("cpu",)).as_text()) is (rows in FEW)
    assert "optimization_barrier" not in traced.lower(lowering_platforms=("tpu",)).as_text()
