"""ELECTRA (Clark et al. 2020, arXiv:2003.10555), following Hugging Face's `modeling_electra.py`.

BERT with embeddings of their own width, and the heads of a generator (`mlm`) and of a discriminator (`rtd`: was this
token replaced?).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmjax.layers.heads import Features, linear_head
from fmjax.layers.linear import Dense, Initializer, normal
from fmjax.layers.mlp import activation
from fmjax.models import bert
from fmjax.models.sizes import checked, resolve

SIZES: dict[str, dict[str, int]] = {
    "small": {"width": 256, "layers": 12, "attention_heads": 4, "mlp_width": 1024, "embedding_width": 128},
    "base": bert.SIZES["base"],
    "large": bert.SIZES["large"],
}


@dataclasses.dataclass(frozen=True)
class Settings(bert.Settings):
    """BERT's settings, and the dropout of the head for multiple choice."""

    choice_dropout: float = 0.1


class ReplacedToken(nn.Module):
    """The discriminator's head: dense, activation and one logit for each token, positive where it was replaced."""

    activation: Callable[[jax.Array], jax.Array]
    reads_pooled: ClassVar[bool] = False
    classes: int = 1
    kernel_init: Initializer = normal(0.02)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Features, batch: Features) -> jax.Array:
        """Returns logits [B,L] in fp32."""
        x = features["hidden"]
        x = self.activation(Dense(x.shape[-1:], ("embed", None), self.kernel_init, dtype=self.dtype, name="dense")(x))
        return linear_head(self, x).reshape(x.shape[:-1])


class Electra(bert.Bert):
    """A BERT with ELECTRA's heads."""

    settings: Settings

    def head_makers(self) -> dict[str, Callable[..., nn.Module]]:
        """Returns, for each kind of head, what builds it."""
        s = self.settings
        makers = super().head_makers()
        del makers["nsp"], makers["pooled"]
        replaced = partial(
            ReplacedToken, activation(s.activation), kernel_init=normal(s.initializer_range), dtype=jnp.dtype(s.dtype)
        )
        classify = self.classify_first("gelu", input_dropout=s.classifier_dropout)
        choice = partial(self.classify_first("gelu", input_dropout=0.0), classes=1, dropout=s.choice_dropout)
        return makers | {"mlm": self.masked_lm("gelu"), "rtd": replaced, "classify": classify, "choice": choice}


def build(*, heads: Mapping[str, Mapping[str, Any]], size: str = "base", **settings: Any) -> Electra:
    """Returns an ELECTRA of a named size (SIZES) with the given heads; see `bert.build`."""
    return checked(Electra(heads, resolve(Settings, SIZES, size, settings)))


INPUTS, checked_batch = bert.INPUTS, bert.checked_batch
