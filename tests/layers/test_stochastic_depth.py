"""Stochastic depth: which branches of which examples are left out, how often at which depth, and nothing without it."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.errors import UserError
from fmjax.inference.pretrained import abstract_params
from fmjax.layers.attention import Context
from fmjax.layers.blocks import PostNorm, PreNorm, StochasticDepth
from fmjax.layers.stack import Layers, stack
from fmjax.models import bert

KEY = jax.random.key(0)
ROWS = 2000


@pytest.fixture(autouse=True)
def eager():
    with jax.disable_jit():
        yield


class Adds(nn.Module):
    """A branch that is its weight, whatever it reads."""

    @nn.compact
    def __call__(self, x, context=None, cache=None):
        weight = self.param("weight", nn.with_logical_partitioning(nn.initializers.ones_init(), (None,)), (1,))
        out = jnp.broadcast_to(weight[None, None], x.shape)
        return out if context is None else (out, cache)


class Same(nn.Module):
    """A norm that changes nothing."""

    @nn.compact
    def __call__(self, x):
        return x


class Tower(nn.Module):
    block: type[nn.Module]
    scan: bool
    rate: float
    layers: int = 3

    @nn.compact
    def __call__(self, x):
        block = partial(self.block, attention=Adds, mlp=Adds, norm=Same, stochastic_depth=self.rate)
        return stack(self, block, Layers(self.layers, self.scan), x, Context())[0]


def test_examples_keep_a_branch_scaled_up_or_lose_it():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, 2, 3)), jnp.float32)
    out = np.asarray(StochasticDepth(0.5).apply({}, x, 0.5, rngs={"dropout": KEY}))
    gone = (out == 0).all(axis=(1, 2))
    assert gone.mean() == pytest.approx(0.25, abs=0.03)
    np.testing.assert_allclose(out[~gone], np.asarray(x)[~gone] / 0.75, rtol=1e-6)
    low = StochasticDepth(0.5).apply({}, x.astype(jnp.bfloat16), 1.0, rngs={"dropout": KEY})
    assert low.dtype == jnp.bfloat16
    assert StochasticDepth(0.5).apply({}, x, 1.0) is x
    assert StochasticDepth(0.0).apply({}, x, 1.0, rngs={"dropout": KEY}) is x


@pytest.mark.parametrize("block", [PreNorm, PostNorm])
def test_the_rate_rises_linearly_with_depth_and_branches_draw_for_themselves(block):
    branches, drawn = ("attention", "mlp"), {}
    for layer in range(3):
        for branch in branches:
            own = {name: {"weight": jnp.zeros((3, 1)).at[layer].set(float(name == branch))} for name in branches}
            out = Tower(block, True, 0.6).apply({"params": {"layers": own}}, jnp.zeros((ROWS, 1, 1)), rngs={"dropout": KEY})
            drawn[layer, branch] = np.asarray(out)[:, 0, 0]
            kept = 1 - 0.6 * layer / 2
            assert (drawn[layer, branch] > 0).mean() == pytest.approx(kept, abs=0.04)
            assert drawn[layer, branch].max() == pytest.approx(1 / kept, rel=1e-6)
    masks = [drawn[layer, branch] > 0 for layer in (1, 2) for branch in branches]
    for first in range(4):
        for second in range(first):
            assert 0.2 < (masks[first] != masks[second]).mean() < 0.8


@pytest.mark.parametrize("block", [PreNorm, PostNorm])
def test_scanned_and_unrolled_stacks_leave_out_the_same(block):
    weights = {name: {"weight": jnp.arange(1.0, 4)[:, None] * scale} for name, scale in (("attention", 1), ("mlp", 10))}
    params, x = {"params": {"layers": weights}}, jnp.zeros((64, 1, 1))
    scanned, unrolled = (Tower(block, scan, 0.6).apply(params, x, rngs={"dropout": KEY}) for scan in (True, False))
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-6)
    assert len(np.unique(scanned)) > 4
    one = Tower(block, False, 0.6, layers=1).apply(jax.tree.map(lambda leaf: leaf[:1], params), x, rngs={"dropout": KEY})
    assert len(np.unique(one)) == 1  # a single layer is the first: none is left out


def test_a_rate_of_0_and_a_model_without_dropout_are_as_before():
    size = {"width": 4, "layers": 2, "attention_heads": 1, "mlp_width": 4, "vocab_size": 8, "positions": 2}
    size |= {"dropout": 0.0, "attention_dropout": 0.0, "embedding_dropout": 0.0}
    batch = {"input_ids": jnp.arange(8, dtype=jnp.int32).reshape(4, 2)}
    plain, deep = (bert.build(heads={}, stochastic_depth=rate, **size) for rate in (0.0, 0.8))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), {"params": abstract_params(plain)})
    first, second = (model.apply(params, batch)["hidden"] for model in (plain, deep))
    assert np.array_equal(first, second)
    calm, drawn = (model.apply(params, batch, rngs={"dropout": KEY})["hidden"] for model in (plain, deep))
    assert np.array_equal(calm, first) and not np.array_equal(drawn, first)
    with pytest.raises(UserError, match=r"model\.stochastic_depth=1\.0: must be at least 0 and less than 1"):
        bert.build(heads={}, stochastic_depth=1.0, **size)
