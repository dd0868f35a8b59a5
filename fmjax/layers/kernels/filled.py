"""The plain path for a cache: attention to its filled part. Letters as in `linear.py`; G key heads.

A cache has room for the longest generation, and continuations of a row multiply that, so that most
of it is empty most of the time. On a CPU, a product with the whole cache takes time in proportion
to its size: with T5-small's beams, attention to 257 places took a third of a layer. The filled
part is rounded up to one of a few lengths, each a branch of the program.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fmjax.layers.kernels.call import target
from fmjax.layers.kernels.plain import attend, heads_first

PARTS, LEAST = 4, 64  # the number of lengths, and the smallest difference between them


def lengths(places: int) -> list[int]:
    """Returns the lengths that a cache is read to, in increasing order; the last is all of it."""
    parts = max(min(PARTS, places // LEAST), 1)
    return [-(-places * (part + 1) // parts) for part in range(parts)]


def attend_filled(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: jax.Array,
    filled: jax.Array | int,
    scale: float,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Returns `plain.attend` of keys of which only the first `filled` may be attended to, as the
    mask [B or 1,1,L,S] says, too."""
    sizes = lengths(k_BSGK.shape[1])
    if len(sizes) == 1 or target().platform != "cpu":
        return attend(q_BLHK, k_BSGK, v_BSGK, mask, unchanged, scale, bias)

    def prefix(size: int) -> Callable[..., jax.Array]:
        def branch(
            q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, bias: jax.Array | None
        ) -> jax.Array:
            k, v = (heads_first(array[:, :, :size]) for array in (k, v))
            near = None if bias is None else bias[..., :size]
            return attend(q, k, v, mask[..., :size], unchanged, scale, near)

        return branch

    # The cache enters the branches in its own layout, [B,G,S,K].
    which = jnp.searchsorted(jnp.array(sizes), filled)
    kept = heads_first(k_BSGK), heads_first(v_BSGK)
    branches = [prefix(size) for size in sizes]
    found: jax.Array = jax.lax.switch(which, branches, q_BLHK, *kept, mask, bias)
    return found


def unchanged(weights: jax.Array) -> jax.Array:
    return weights
