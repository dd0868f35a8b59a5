"""The wiring of layers. Letters as in `linear.py`.

A block maps x, the layer's context, and its own cache (or None) to the new x and cache. A block
with `cross` is a decoder block: it attends to a memory between self-attention and the feed-forward
layer. The tap `hidden` has its output.

Stochastic depth (Huang et al. 2016, arXiv:1603.09382) drops the residual branches of random
examples in training. Its rate rises linearly from 0 at the first layer to `stochastic_depth` at the
last; each branch draws independently, as in DeiT.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax

from fmjax.distributed.sharding import constrain
from fmjax.layers.attention import Cache, Context
from fmjax.layers.dropout import Dropout
from fmjax.layers.taps import tap

ModuleFactory = Callable[..., nn.Module]
Caches = dict[str, Cache]  # the caches of one layer, by attention: "attention", "cross"


class StochasticDepth(nn.Module):
    """Drops a branch for some examples, and scales it up for the others, so that its mean does not
    change."""

    rate: float

    @nn.compact
    def __call__(self, branch_BLD: jax.Array, depth: jax.Array | float) -> jax.Array:
        """Returns [B,L,D]: 0 with probability rate x depth, otherwise the branch divided by one
        minus that; without dropout, the branch."""
        if not self.rate or not self.has_rng("dropout"):
            return branch_BLD
        kept = 1 - self.rate * depth
        chosen = jax.random.bernoulli(self.make_rng("dropout"), kept, (branch_BLD.shape[0], 1, 1))
        return branch_BLD * (chosen / kept).astype(branch_BLD.dtype)


class PostNorm(nn.Module):
    """Normalizes after each residual sum (the original Transformer, BERT, BART)."""

    attention: ModuleFactory
    mlp: ModuleFactory
    norm: ModuleFactory
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    cross: ModuleFactory | None = None

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, context: Context, cache: Caches | None = None
    ) -> tuple[jax.Array, Caches]:
        """Maps [B,L,D] to [B,L,D]."""
        drop = Dropout(self.dropout)
        skip = StochasticDepth(self.stochastic_depth)
        before, after = cache or {}, Caches()
        seen, after["attention"] = self.attention(name="attention")(
            x_BLD, context, before.get("attention")
        )
        x_BLD = self.norm(name="attention_norm")(x_BLD + skip(drop(seen), context.depth))
        if self.cross is not None:
            seen, after["cross"] = self.cross(name="cross")(x_BLD, context, before.get("cross"))
            x_BLD = self.norm(name="cross_norm")(x_BLD + skip(drop(seen), context.depth))
        x_BLD = self.norm(name="mlp_norm")(
            x_BLD + skip(drop(self.mlp(name="mlp")(x_BLD)), context.depth)
        )
        return tap(self, "hidden", constrain(x_BLD, "act_batch", "act_length", "act_embed")), after


class PreNorm(nn.Module):
    """Normalizes the input of each part, and never the residual stream itself (GPT-2, ViT, T5,
    Llama)."""

    attention: ModuleFactory
    mlp: ModuleFactory
    norm: ModuleFactory
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    cross: ModuleFactory | None = None

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, context: Context, cache: Caches | None = None
    ) -> tuple[jax.Array, Caches]:
        """Maps [B,L,D] to [B,L,D]."""
        drop = Dropout(self.dropout)
        skip = StochasticDepth(self.stochastic_depth)
        before, after = cache or {}, Caches()
        normed = self.norm(name="attention_norm")(x_BLD)
        seen, after["attention"] = self.attention(name="attention")(
            normed, context, before.get("attention")
        )
        x_BLD = x_BLD + skip(drop(seen), context.depth)
        if self.cross is not None:
            normed = self.norm(name="cross_norm")(x_BLD)
            seen, after["cross"] = self.cross(name="cross")(normed, context, before.get("cross"))
            x_BLD = x_BLD + skip(drop(seen), context.depth)
        x_BLD = x_BLD + skip(
            drop(self.mlp(name="mlp")(self.norm(name="mlp_norm")(x_BLD))), context.depth
        )
        return tap(self, "hidden", constrain(x_BLD, "act_batch", "act_length", "act_embed")), after
