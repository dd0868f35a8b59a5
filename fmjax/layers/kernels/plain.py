"""Attention as a product, a softmax and a product: every device and every call, at the price of an
array [B,H,L,S]. Letters as in `linear.py`; G key heads, R query heads of each."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

LOWEST = np.finfo(np.float32).min


def heads_first(x: jax.Array) -> jax.Array:
    """Returns [B,H,L,K] from [B,L,H,K], and vice versa."""
    return x.swapaxes(1, 2)


def attend(
    q_BLHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: jax.Array | None,
    drop: Callable[[jax.Array], jax.Array],
    scale: float | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Returns drop(softmax(scale q k^T + bias)) v as [B,L,H,K]; `scale` is 1 / sqrt(K) unless
    given.

    `drop` maps the weights [B,H,L,S]. With fewer key heads than query heads, neighboring query
    heads share one (Ainslie et al. 2023, arXiv:2305.13245). Scores are computed and normalized in
    fp32. A masked score is the lowest number rather than -inf: a row with nothing to attend to
    averages its values, as in the reference, and is not NaN.
    """
    rows, length, heads, width = q_BLHK.shape
    groups = k_BSGK.shape[2]
    scale = width**-0.5 if scale is None else scale
    # With rows and heads in front, the products are plain batched ones, which a CPU does in less
    # time.
    q = heads_first(q_BLHK * scale).reshape(rows, groups, heads // groups, length, width)
    k, v = heads_first(k_BSGK), heads_first(v_BSGK)
    scores = jnp.einsum("BGRLK,BGSK->BGRLS", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, heads, length, -1)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, LOWEST)
    weights = drop(jax.nn.softmax(scores, axis=-1).astype(v.dtype)).reshape(*q.shape[:4], -1)
    return heads_first(jnp.einsum("BGRLS,BGSK->BGRLK", weights, v).reshape(rows, heads, length, -1))
