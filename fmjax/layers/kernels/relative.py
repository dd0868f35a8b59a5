"""Flash attention for TPUs with a bias that depends on the distance from query to key alone: the
calls that `relative_kernel.py` serves, and its arrays for them. Letters as in `linear.py`; S keys.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from fmjax.layers.bias import RelativeBias
from fmjax.layers.kernels.call import Call, over_mesh
from fmjax.layers.kernels.tpu import STEP, static_refusal
from fmjax.layers.mask import MASKED

SIZES = (512, 256, 128)  # of blocks: powers of 2, of whole lanes
MOST = 2**20  # numbers of a head's queries: the gradient of all of them is in fast memory


def refusal(call: Call) -> str:
    """Returns why the kernel cannot compute a call, "" if it can."""
    if call.bias is not None and not isinstance(call.bias, RelativeBias):
        return "its bias is not one of distances; set flash"
    if call.mask.window:
        return "it has no windows; set splash"
    if call.lengths[0] * call.q.shape[-1] > MOST:
        most = MOST // call.q.shape[-1]
        return f"there are more than {most:,} queries; set flash or chunked"
    return static_refusal(call)


def attend(call: Call) -> jax.Array:
    """Returns [B,L,H,K]; 0 for a query that attends to no key."""
    # Imported here, since that takes time which runs on other machines do not have.
    from fmjax.layers.kernels.relative_kernel import Tiling, attention

    rows, (length, keys) = call.q.shape[0], call.lengths
    block = min(SIZES, key=lambda size: -(-max(length, keys) // size) * (size + STEP))
    over, under = -length % block, -keys % block
    tiling = Tiling(block, (length + over) // block, (keys + under) // block, call.mask.causal)
    query, key = call.mask.segments(rows, length, keys)
    if query is None and under:
        query, key = jnp.zeros((rows, length), jnp.int32), jnp.zeros((rows, keys), jnp.int32)

    def fill(x: jax.Array, more: int) -> jax.Array:
        return jnp.pad(x.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, more)))

    each = call.q.shape[2] // call.k.shape[2]
    arrays = {"q": fill(call.q * call.scale, over)}
    for name, array in (("k", call.k), ("v", call.v)):
        arrays[name] = jnp.repeat(fill(array, under), each, axis=1)
    if query is not None and key is not None:
        arrays["query_segments"] = jnp.pad(query, ((0, 0), (0, over)))
        arrays["key_segments"] = jnp.pad(key, ((0, 0), (0, under)), constant_values=MASKED)
    if isinstance(call.bias, RelativeBias):
        # Reversed, from query minus key = -(S padded) on.
        table = call.bias.by_distance(length, keys)[:, ::-1]
        arrays["distances"] = jnp.pad(table.astype(jnp.float32), ((0, 0), (under + 1, over)))
    out = over_mesh(partial(attention, tiling), arrays)[..., :length]
    return out.transpose(0, 3, 1, 2)
