"""Attention to the filled part of a cache is attention to all of it under its mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.layers.kernels import filled
from fmjax.layers.kernels.call import lowered_for
from fmjax.layers.kernels.plain import attend

PLACES = 257


def drawn(places: int):
    """Queries, keys and values of two heads, and a bias."""
    rng = np.random.default_rng(places)
    shapes = [(2, 3, 4, 8), (2, places, 2, 8), (2, places, 2, 8), (1, 4, 3, places)]
    return [jnp.array(rng.normal(0, 0.3, shape), jnp.float32) for shape in shapes]


def test_the_lengths_end_with_the_whole_cache():
    assert filled.lengths(PLACES) == [65, 129, 193, 257]
    assert filled.lengths(129) == [65, 129]
    assert filled.lengths(127) == [127]
    assert filled.lengths(1000) == [250, 500, 750, 1000]


@pytest.mark.parametrize("biased", [False, True])
def test_it_is_attention_to_the_whole_cache(biased):
    q, k, v, bias = drawn(PLACES)
    added = bias if biased else None

    @jax.jit
    def both(count):
        mask = jnp.broadcast_to(jnp.arange(PLACES) < count, (1, 1, 3, PLACES))
        few = filled.attend_filled(q, k, v, mask, count, 0.3, added)
        return few, attend(q, k, v, mask, filled.unchanged, 0.3, added)

    for count in (1, 64, 65, 66, 129, 130, 193, 194, 256, 257):
        few, whole = both(count)
        np.testing.assert_allclose(few, whole, atol=1e-6, rtol=0)


def test_only_a_cpu_has_branches():
    q, k, v, _ = drawn(PLACES)
    mask = jnp.ones((1, 1, 3, PLACES), bool)

    def program(platform: str) -> str:
        with lowered_for(platform):
            return str(
                jax.make_jaxpr(lambda count: filled.attend_filled(q, k, v, mask, count, 0.3))(
                    jnp.int32(9)
                )
            )

    assert "cond[" in program("cpu")
    assert "cond[" not in program("gpu")
