"""How a layer is wired, and how layers are stacked. Letters as in `linear.py`.

A block maps x, the context that all layers share, and its own cache (or None) to the new x and cache. A block with `cross`
is a decoder's: it attends to a memory between attending to itself and its feed-forward layer.

Stochastic depth (Huang et al. 2016, arXiv:1603.09382) leaves out the residual branches of single examples in training. Its rate
rises linearly from 0 at the first layer to `stochastic_depth` at the last, each branch drawing for itself, as in DeiT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmjax.distributed.sharding import constrain
from fmjax.errors import UserError, nearest
from fmjax.layers.attention import Context

ModuleFactory = Callable[..., nn.Module]
Caches = dict[str, Any]

# What of a layer is kept for its backward pass (Chen et al. 2016, arXiv:1604.06174): all, the results of matrix products with
# parameters, or nothing but what it read.
REMAT: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything": jax.checkpoint_policies.nothing_saveable,
}


class StochasticDepth(nn.Module):
    """Leaves out a branch of some examples, and scales it up in the others, so that its mean stays the same."""

    rate: float

    @nn.compact
    def __call__(self, branch_BLD: jax.Array, depth: jax.Array | float) -> jax.Array:
        """Returns [B,L,D]: 0 with probability rate x depth, the branch over 1 minus that else; without dropout, the branch."""
        if not self.rate or not self.has_rng("dropout"):
            return branch_BLD
        kept = 1 - self.rate * depth
        chosen = jax.random.bernoulli(self.make_rng("dropout"), kept, (branch_BLD.shape[0], 1, 1))
        return branch_BLD * (chosen / kept).astype(branch_BLD.dtype)


class PostNorm(nn.Module):
    """Normalise after each residual sum (the original Transformer, BERT, BART)."""

    attention: ModuleFactory
    mlp: ModuleFactory
    norm: ModuleFactory
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    cross: ModuleFactory | None = None

    @nn.compact
    def __call__(self, x_BLD: jax.Array, context: Context, cache: Caches | None = None) -> tuple[jax.Array, Caches]:
        """Maps [B,L,D] to [B,L,D]."""
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        skip = StochasticDepth(self.stochastic_depth)
        before, after = cache or {}, {}
        seen, after["attention"] = self.attention(name="attention")(x_BLD, context, before.get("attention"))
        x_BLD = self.norm(name="attention_norm")(x_BLD + skip(drop(seen), context.depth))
        if self.cross is not None:
            seen, after["cross"] = self.cross(name="cross")(x_BLD, context, before.get("cross"))
            x_BLD = self.norm(name="cross_norm")(x_BLD + skip(drop(seen), context.depth))
        x_BLD = self.norm(name="mlp_norm")(x_BLD + skip(drop(self.mlp(name="mlp")(x_BLD)), context.depth))
        return constrain(x_BLD, "act_batch", "act_length", "act_embed"), after


class PreNorm(nn.Module):
    """Normalise what each part reads, so that the residual stream itself is never normalised (GPT-2, ViT, T5, Llama)."""

    attention: ModuleFactory
    mlp: ModuleFactory
    norm: ModuleFactory
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    cross: ModuleFactory | None = None

    @nn.compact
    def __call__(self, x_BLD: jax.Array, context: Context, cache: Caches | None = None) -> tuple[jax.Array, Caches]:
        """Maps [B,L,D] to [B,L,D]."""
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        skip = StochasticDepth(self.stochastic_depth)
        before, after = cache or {}, {}
        normed = self.norm(name="attention_norm")(x_BLD)
        seen, after["attention"] = self.attention(name="attention")(normed, context, before.get("attention"))
        x_BLD = x_BLD + skip(drop(seen), context.depth)
        if self.cross is not None:
            normed = self.norm(name="cross_norm")(x_BLD)
            seen, after["cross"] = self.cross(name="cross")(normed, context, before.get("cross"))
            x_BLD = x_BLD + skip(drop(seen), context.depth)
        x_BLD = x_BLD + skip(drop(self.mlp(name="mlp")(self.norm(name="mlp_norm")(x_BLD))), context.depth)
        return constrain(x_BLD, "act_batch", "act_length", "act_embed"), after


def stack(
    parent: nn.Module,
    block: ModuleFactory,
    layers: int,
    scan: bool,
    remat: str,
    x: jax.Array,
    context: Context,
    caches: Sequence[Caches] | None = None,
) -> tuple[jax.Array, Sequence[Caches] | None]:
    """Runs x through `layers` blocks whose parameters are stacked on a first axis, as `parent`'s parameter `layers`, or come
    as a tuple with those of each (`apart`). Returns the new x and, where there are `caches`, those of each layer.

    Each layer has its own initialisation key, and its index is folded into the dropout key, so that the parameters and
    the loss do not depend on `scan`: one compiled body for all layers, or an unrolled loop, which runs faster and
    compiles slower; with caches it is always that. The context tells each layer its depth.

    `remat` is the name in REMAT of what is kept of each layer for the backward pass, which computes the rest again. Raises
    UserError if there is none.
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
        placed = dataclasses.replace(context, depth=jnp.asarray(index, jnp.float32) / max(layers - 1, 1))
        return module.apply({"params": params}, x, placed, cache, rngs=rngs)

    if remat not in REMAT:
        raise UserError(f'model.remat="{remat}": no such policy{nearest(remat, REMAT)}; choose one of {", ".join(REMAT)}')
    if remat != "none":
        # Outside a scan the compiler would merge what is computed again with what was computed first.
        apply = jax.checkpoint(apply, policy=REMAT[remat], prevent_cse=not scan)
    if scan and caches is None:
        return jax.lax.scan(lambda x, layer: (apply(x, *layer, None)[0], None), x, (jnp.arange(layers), params))
    written = []
    each = params if isinstance(params, tuple) else unstacked(params)
    for index, (own, cache) in enumerate(zip(each, caches or (None,) * layers, strict=True)):
        x, cache = apply(x, index, own, cache)
        written.append(cache)
    return x, None if caches is None else tuple(written)


def unstacked(params: Any) -> tuple[Any, ...]:
    """Returns the parameters of each layer, from those of all, stacked on a first axis."""
    leaves, structure = jax.tree.flatten(params)
    return tuple(jax.tree.unflatten(structure, layer) for layer in zip(*map(jnp.unstack, leaves), strict=True))


def apart(params: Any) -> Any:
    """Returns a model's parameters with those of each layer for themselves, for a loop: each read of a stack copies."""
    if not isinstance(params, Mapping):
        return params
    return {name: unstacked(part) if name == "layers" else apart(part) for name, part in params.items()}
