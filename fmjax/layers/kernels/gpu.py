"""Fused attention for GPUs: cuDNN's, and JAX's Pallas kernel. Letters as in `linear.py`; S keys."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from fmjax.layers.kernels.call import DIVIDED, Call, length_parts, over_mesh
from fmjax.layers.kernels.plain import heads_first
from fmjax.layers.mask import MASKED

WIDEST, EIGHT = 128, 8  # cuDNN's heads: at most so wide, and a multiple of this
BLOCK = 128  # of the Pallas kernel: lengths are filled up to whole ones


def cudnn_refusal(call: Call) -> str:
    """Returns why cuDNN cannot compute a call, "" if it can."""
    width, mask = call.q.shape[-1], call.mask
    if call.q.dtype.itemsize != 2:
        return f"it computes in 16 bits, not in {call.q.dtype}; set model.dtype=bfloat16, or xla"
    if width > WIDEST or width % EIGHT:
        return f"heads are {width} wide, not a multiple of {EIGHT} up to {WIDEST}; set xla"
    if mask.key_positions is not None or not isinstance(mask.place, int) or mask.place:
        return "queries and keys do not begin at the same place; set xla or chunked"
    dense = call.bias is not None or mask.keys is not None or mask.query_segments is not None
    if dense and any(length % 2 for length in call.lengths):
        return "lengths are odd, which it cannot mask; set data.max_length to an even one, or xla"
    if mask.window and not mask.causal:
        return "its windows look back only; set xla or chunked"
    return DIVIDED if length_parts() > 1 else ""


def cudnn(call: Call) -> jax.Array:
    """Returns [B,L,H,K]. Keys and segments become a mask [B,1,L,S], which all heads share."""
    mask, (length, keys) = call.mask, call.lengths
    plain = dataclasses.replace(mask, causal=False, window=0, made=None)
    others = plain.dense(length, keys)
    if others is not None:
        others = jnp.broadcast_to(others, (*others.shape[:2], length, keys))
    bias = call.dense_bias()
    return jax.nn.dot_product_attention(
        call.q,
        call.k,
        call.v,
        bias=None if bias is None else bias.astype(call.q.dtype),
        mask=others,
        scale=call.scale,
        is_causal=mask.causal,
        local_window_size=(mask.window - 1, 0) if mask.window else None,
        implementation="cudnn",
    )


def pallas_refusal(call: Call) -> str:
    """Returns why JAX's Pallas kernel cannot compute a call, "" if it can."""
    width, mask = call.q.shape[-1], call.mask
    if call.bias is not None or mask.window:
        return "it has neither a bias nor windows; set cudnn or xla"
    if call.crosses or call.lengths[0] != call.lengths[1]:
        return "it computes self-attention only; set cudnn or xla"
    if width & (width - 1) or width < 16:
        return f"heads are {width} wide, not a power of two from 16 on; set cudnn or xla"
    if mask.key_positions is not None or not isinstance(mask.place, int) or mask.place:
        return "queries and keys do not begin at the same place; set xla or chunked"
    return DIVIDED if length_parts() > 1 else ""


def pallas(call: Call) -> jax.Array:
    """Returns [B,L,H,K]. Its segments are those of queries and keys alike: masked keys are texts of
    their own, whose queries attend to each other."""
    library = pallas_library()
    rows, length = call.q.shape[:2]
    over = -length % BLOCK
    _, segments = call.mask.segments(rows, length, length)
    if segments is None and over:
        segments = jnp.zeros((rows, length), jnp.int32)

    def fill(x: jax.Array) -> jax.Array:
        return jnp.pad(heads_first(x), ((0, 0), (0, 0), (0, over), (0, 0)))

    arrays = {name: fill(array) for name, array in (("q", call.q), ("k", call.k), ("v", call.v))}
    if segments is not None:
        arrays["key_segments"] = jnp.pad(segments, ((0, 0), (0, over)), constant_values=MASKED)

    def local(arrays: dict[str, jax.Array]) -> jax.Array:
        q, k, v = (heads_first(arrays[name]) for name in ("q", "k", "v"))
        each = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(array, each, axis=2) for array in (k, v))
        out = library.mha(
            q,
            k,
            v,
            arrays.get("key_segments"),
            sm_scale=call.scale,
            causal=call.mask.causal,
            block_sizes=library.BlockSizes.get_default(),
        )
        return heads_first(out)

    return heads_first(over_mesh(local, arrays)[:, :, :length])


def pallas_library() -> Any:
    """Returns JAX's module of the kernel, imported only where it is used, since that takes time.

    JAX 0.12 still has it, deprecated in favor of the library tokamax, which cannot compile for a
    device that is not there.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention
    return attention
