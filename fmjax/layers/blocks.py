"""How a layer is wired, and how layers are stacked. Letters as in `linear.py`.

A block maps x, the context that all layers share, and its own cache (or None) to the new x and cache. A block with `cross`
is a decoder's: it attends to a memory between attending to itself and its feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmjax.layers.attention import Context
from fmjax.sharding import constrain

ModuleFactory = Callable[..., nn.Module]
Caches = dict[str, Any]


class PostNorm(nn.Module):
    """Normalise after each residual sum (the original Transformer, BERT, BART)."""

    attention: ModuleFactory
    mlp: ModuleFactory
    norm: ModuleFactory
    dropout: float = 0.0
    cross: ModuleFactory | None = None

    @nn.compact
    def __call__(self, x_BLD: jax.Array, context: Context, cache: Caches | None = None) -> tuple[jax.Array, Caches]:
        """Maps [B,L,D] to [B,L,D]."""
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        before, after = cache or {}, {}
        seen, after["attention"] = self.attention(name="attention")(x_BLD, context, before.get("attention"))
        x_BLD = self.norm(name="attention_norm")(x_BLD + drop(seen))
        if self.cross is not None:
            seen, after["cross"] = self.cross(name="cross")(x_BLD, context, before.get("cross"))
            x_BLD = self.norm(name="cross_norm")(x_BLD + drop(seen))
        x_BLD = self.norm(name="mlp_norm")(x_BLD + drop(self.mlp(name="mlp")(x_BLD)))
        return constrain(x_BLD, "act_batch", "act_length", "act_embed"), after


class PreNorm(nn.Module):
    """Normalise what each part reads, so that the residual stream itself is never normalised (GPT-2, ViT, T5, Llama)."""

    attention: ModuleFactory
    mlp: ModuleFactory
    norm: ModuleFactory
    dropout: float = 0.0
    cross: ModuleFactory | None = None

    @nn.compact
    def __call__(self, x_BLD: jax.Array, context: Context, cache: Caches | None = None) -> tuple[jax.Array, Caches]:
        """Maps [B,L,D] to [B,L,D]."""
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        before, after = cache or {}, {}
        normed = self.norm(name="attention_norm")(x_BLD)
        seen, after["attention"] = self.attention(name="attention")(normed, context, before.get("attention"))
        x_BLD = x_BLD + drop(seen)
        if self.cross is not None:
            normed = self.norm(name="cross_norm")(x_BLD)
            seen, after["cross"] = self.cross(name="cross")(normed, context, before.get("cross"))
            x_BLD = x_BLD + drop(seen)
        x_BLD = x_BLD + drop(self.mlp(name="mlp")(self.norm(name="mlp_norm")(x_BLD)))
        return constrain(x_BLD, "act_batch", "act_length", "act_embed"), after


def stack(
    parent: nn.Module,
    block: ModuleFactory,
    layers: int,
    scan: bool,
    x: jax.Array,
    context: Context,
    caches: Caches | None = None,
) -> tuple[jax.Array, Caches]:
    """Runs x through `layers` blocks whose parameters are stacked on a first axis, as `parent`'s parameter `layers`; so
    are the caches. Returns the new x and caches.

    Each layer has its own initialisation key, and its index is folded into the dropout key, so that the parameters and
    the loss do not depend on `scan`: one compiled body for all layers, or an unrolled loop, which runs faster and
    compiles slower.
    """
    module: Any = block(parent=None)

    def init(key: jax.Array) -> Any:
        boxed = jax.vmap(lambda k: module.init(k, x, context)["params"])(jax.random.split(key, layers))
        axis = {nn.PARTITION_NAME: "layers"}
        return jax.tree.map(lambda box: box.add_axis(0, axis), boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))

    # `param` would run `init` again to compare shapes; with a cache that holds the memory it would make fewer parameters.
    made = parent.has_variable("params", "layers")
    params = nn.meta.unbox(parent.get_variable("params", "layers")) if made else parent.param("layers", init)
    key = parent.make_rng("dropout") if parent.has_rng("dropout") else None

    def apply(x: jax.Array, index: jax.Array | int, params: Any, cache: Caches | None) -> tuple[jax.Array, Caches]:
        rngs = {} if key is None else {"dropout": jax.random.fold_in(key, index)}
        return module.apply({"params": params}, x, context, cache, rngs=rngs)

    if scan:
        return jax.lax.scan(lambda x, layer: apply(x, *layer), x, (jnp.arange(layers), params, caches))
    leaves, structure = jax.tree.flatten((params, caches))
    written = []
    for index, layer in enumerate(zip(*(jnp.unstack(leaf) for leaf in leaves), strict=True)):
        x, cache = apply(x, index, *jax.tree.unflatten(structure, layer))
        written.append(cache)
    return x, jax.tree.map(lambda *parts: jnp.stack(parts), *written)
