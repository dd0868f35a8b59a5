"""JAX's Pallas kernels for TPUs. Letters as in `linear.py`; G key heads, S keys.

Splash attention skips blocks that a causal mask or a window rules out. Flash attention (Dao et al.
2022, arXiv:2205.14135) adds a bias. Both read segments: a masked key is in a segment of its own, as
are the keys that fill up a length to whole blocks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fmjax.layers.kernels.call import DIVIDED, SAVED, Call, length_parts, over_mesh
from fmjax.layers.kernels.plain import heads_first
from fmjax.layers.mask import MASKED

LANES = 128
SIZES = (512, 384, 256, 128)  # of blocks; the kernels want multiples of the lanes
STEP = 64  # a block's fixed cost, in rows, by which few large blocks are preferred to many small
Arrays = dict[str, jax.Array]


def splash_refusal(call: Call) -> str:
    """Returns why splash attention cannot compute a call, "" if it can."""
    if call.bias is not None:
        return "it adds no bias; set flash"
    return static_refusal(call)


def flash_refusal(call: Call) -> str:
    """Returns why flash attention cannot compute a call, "" if it can."""
    if call.mask.window:
        return "it has no windows; set splash"
    return static_refusal(call)


def static_refusal(call: Call) -> str:
    """Returns what both kernels lack for a call, "" if nothing."""
    if call.mask.key_positions is not None or not isinstance(call.mask.place, int):
        return "its mask is not known when the program is compiled; set xla or chunked"
    if call.mask.place or (call.mask.causal and call.lengths[0] != call.lengths[1]):
        return "queries and keys do not begin at the same place; set xla or chunked"
    return DIVIDED if length_parts() > 1 else ""


def block_size(length: int) -> int:
    """Returns the size of blocks for a length, which they fill up."""
    return min(SIZES, key=lambda size: -(-length // size) * (size + STEP))


def prepared(call: Call) -> tuple[Arrays, tuple[int, int]]:
    """Returns the arrays of a call, heads before lengths, filled up to whole blocks; and the sizes
    of blocks of queries and of keys."""
    rows, (length, keys) = call.q.shape[0], call.lengths
    sizes = block_size(length), block_size(keys)
    over, under = -length % sizes[0], -keys % sizes[1]
    query, key = call.mask.segments(rows, length, keys)
    if query is None and under:
        query, key = jnp.zeros((rows, length), jnp.int32), jnp.zeros((rows, keys), jnp.int32)

    def fill(x: jax.Array, more: int) -> jax.Array:
        return jnp.pad(heads_first(x), ((0, 0), (0, 0), (0, more), (0, 0)))

    arrays = {
        "q": fill(call.q * call.scale, over),
        "k": fill(call.k, under),
        "v": fill(call.v, under),
    }
    if query is not None and key is not None:
        arrays["query_segments"] = jnp.pad(query, ((0, 0), (0, over)))
        arrays["key_segments"] = jnp.pad(key, ((0, 0), (0, under)), constant_values=MASKED)
    return arrays, sizes


def splash(call: Call) -> jax.Array:
    """Returns [B,L,H,K] by splash attention."""
    # Imported here, since that takes time which runs on other machines do not have.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    arrays, (query, key) = prepared(call)
    blocks = library.BlockSizes(
        block_q=query,
        block_kv=key,
        block_kv_compute=key,
        block_q_dkv=query,
        block_kv_dkv=key,
        block_kv_dkv_compute=key,
        block_q_dq=query,
        block_kv_dq=key,
    )
    seen = splash_mask(call, arrays["q"].shape[2], arrays["k"].shape[2])

    def local(arrays: Arrays) -> jax.Array:
        whole = masks.MultiHeadMask([seen] * arrays["q"].shape[1])
        kernel = library.make_splash_mha(
            mask=whole,
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=SAVED,
        )

        def one(own: Arrays) -> jax.Array:
            segments = None
            if "query_segments" in own:
                segments = library.SegmentIds(own["query_segments"], own["key_segments"])
            result: jax.Array = kernel(own["q"], own["k"], own["v"], segment_ids=segments)
            return result

        return jax.vmap(one)(arrays)

    return heads_first(over_mesh(local, arrays)[:, :, : call.lengths[0]])


def splash_mask(call: Call, length: int, keys: int) -> Any:
    """Returns splash attention's form of what places allow: causal, a window, or everything."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape, before = (length, keys), call.mask.window - 1
    if call.mask.window:
        return masks.LocalMask(shape, (before, 0 if call.mask.causal else before), offset=0)
    return masks.CausalMask(shape) if call.mask.causal else masks.FullMask(shape)


def flash(call: Call) -> jax.Array:
    """Returns [B,L,H,K] by flash attention; the bias is rounded to the type of the queries."""
    from jax.experimental.pallas.ops.tpu import flash_attention as library

    arrays, (query, key) = prepared(call)
    each = call.q.shape[2] // call.k.shape[2]
    arrays |= {name: jnp.repeat(arrays[name], each, axis=1) for name in ("k", "v")}
    lengths = arrays["q"].shape[2], arrays["k"].shape[2]
    blocks = flash_blocks(query, key)
    dense = call.dense_bias()
    if dense is not None:
        bias = jnp.broadcast_to(dense, (len(dense), call.q.shape[2], *call.lengths))
        more = [(0, whole - own) for whole, own in zip(lengths, call.lengths, strict=True)]
        arrays["bias"] = jnp.pad(bias.astype(call.q.dtype), ((0, 0), (0, 0), *more))

    def attend(own: Arrays, bias: jax.Array | None) -> jax.Array:
        segments = None
        if "query_segments" in own:
            segments = library.SegmentIds(own["query_segments"], own["key_segments"])
        result: jax.Array = library.flash_attention(
            own["q"],
            own["k"],
            own["v"],
            bias,
            segments,
            causal=call.mask.causal,
            block_sizes=blocks,
        )
        return result

    def local(arrays: Arrays) -> jax.Array:
        bias = arrays.get("bias")
        others = {name: array for name, array in arrays.items() if name != "bias"}
        if bias is None or bias.shape[0] == arrays["q"].shape[0]:
            return attend(others, bias)

        # Rows are mapped: the bias that they share stays one array.
        def one(own: Arrays) -> jax.Array:
            return attend({name: array[None] for name, array in own.items()}, bias)[0]

        return jax.vmap(one)(others)

    return heads_first(over_mesh(local, arrays)[:, :, : call.lengths[0]])


def flash_blocks(query: int, key: int) -> Any:
    """Returns flash attention's sizes of blocks."""
    from jax.experimental.pallas.ops.tpu import flash_attention as library

    return library.BlockSizes(
        block_q=query,
        block_k_major=key,
        block_k=key,
        block_b=1,
        block_q_major_dkv=query,
        block_k_major_dkv=key,
        block_k_dkv=key,
        block_q_dkv=query,
        block_k_major_dq=LANES,  # its kernel reads an array [B,H,L,block_k_major_dq]
        block_k_dq=LANES,
        block_q_dq=query,
    )
