"""Multi-head attention (Vaswani et al. 2017). Letters as in `linear.py`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmjax.layers.linear import Dense, Initializer, normal
from fmjax.sharding import constrain


def key_mask(attention_mask_BS: jax.Array) -> jax.Array:
    """Returns bool [B,1,1,S]: which keys may be attended to. Queries are not masked, as in the reference."""
    return attention_mask_BS.astype(bool)[:, None, None, :]


def segment_mask(segment_ids_BL: jax.Array) -> jax.Array:
    """Returns bool [B,1,L,L]: a position attends to those of its own segment (0, the padding, being one too)."""
    return segment_ids_BL[:, None, :, None] == segment_ids_BL[:, None, None, :]


def attend(q_BLHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, mask: jax.Array | None, drop: nn.Dropout) -> jax.Array:
    """Returns softmax(q k^T / sqrt(K)) v as [B,L,H,K]; `mask` is bool, broadcastable to [B,H,L,S].

    Scores are taken and normalised in fp32. A masked score is the type's lowest number rather than -inf, so that a row
    with nothing to attend to averages its values, as in the reference, and is not NaN.
    """
    scale = q_BLHK.shape[-1] ** -0.5
    scores = jnp.einsum("BLHK,BSHK->BHLS", q_BLHK * scale, k_BSHK, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = drop(jax.nn.softmax(scores, axis=-1).astype(v_BSHK.dtype))
    return jnp.einsum("BHLS,BSHK->BLHK", weights, v_BSHK)


class Attention(nn.Module):
    """Projections to queries, keys and values, `attend`, and the projection back."""

    heads: int
    head_width: int
    dropout: float = 0.0
    kernel_init: Initializer = normal(0.02)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array, mask: jax.Array | None = None, memory_BSD: jax.Array | None = None) -> jax.Array:
        """Attends from x to the memory (x itself if none is given); returns [B,L,D]."""
        memory_BSD = x_BLD if memory_BSD is None else memory_BSD

        def project(x: jax.Array, name: str) -> jax.Array:
            layer = Dense((self.heads, self.head_width), ("embed", "heads", "kv"), self.kernel_init, dtype=self.dtype, name=name)
            return constrain(layer(x), "act_batch", "act_length", "act_heads", None)

        q, k, v = project(x_BLD, "query"), project(memory_BSD, "key"), project(memory_BSD, "value")
        # Dropout is active exactly when the caller passes a "dropout" key.
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        out = attend(q, k, v, mask, drop)
        return Dense((x_BLD.shape[-1],), ("heads", "kv", "embed"), self.kernel_init, dtype=self.dtype, name="out")(out)
