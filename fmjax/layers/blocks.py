"""How a layer is wired, and how layers are stacked. Letters as in `linear.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmjax.sharding import constrain

ModuleFactory = Callable[..., nn.Module]


class PostNorm(nn.Module):
    """Normalise after each residual sum (the original Transformer, BERT)."""

    attention: ModuleFactory
    mlp: ModuleFactory
    norm: ModuleFactory
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x_BLD: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Maps [B,L,D] to [B,L,D]."""
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        x_BLD = self.norm(name="attention_norm")(x_BLD + drop(self.attention(name="attention")(x_BLD, mask)))
        x_BLD = self.norm(name="mlp_norm")(x_BLD + drop(self.mlp(name="mlp")(x_BLD)))
        return constrain(x_BLD, "act_batch", "act_length", "act_embed")


def stack(parent: nn.Module, block: ModuleFactory, layers: int, scan: bool, x: jax.Array, *args: Any) -> jax.Array:
    """Runs x through `layers` blocks whose parameters are stacked on a first axis, as `parent`'s parameter `layers`.

    Each layer has its own initialisation key, and its index is folded into the dropout key, so that the parameters and
    the loss do not depend on `scan`: one compiled body for all layers, or an unrolled loop, which runs faster and
    compiles slower.
    """
    module: Any = block(parent=None)

    def init(key: jax.Array) -> Any:
        boxed = jax.vmap(lambda k: module.init(k, x, *args)["params"])(jax.random.split(key, layers))
        axis = {nn.PARTITION_NAME: "layers"}
        return jax.tree.map(lambda box: box.add_axis(0, axis), boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))

    params = parent.param("layers", init)
    key = parent.make_rng("dropout") if parent.has_rng("dropout") else None

    def apply(x: jax.Array, index: jax.Array | int, params: Any) -> jax.Array:
        rngs = {} if key is None else {"dropout": jax.random.fold_in(key, index)}
        return module.apply({"params": params}, x, *args, rngs=rngs)

    if scan:
        return jax.lax.scan(lambda x, layer: (apply(x, *layer), None), x, (jnp.arange(layers), params))[0]
    leaves, structure = jax.tree.flatten(params)
    for index, layer in enumerate(zip(*(jnp.unstack(leaf) for leaf in leaves), strict=True)):
        x = apply(x, index, jax.tree.unflatten(structure, layer))
    return x
