"""ELECTRA (Clark et al. 2020, arXiv:2003.10555), following Hugging Face's `modeling_electra.py`.

BERT with a separate embedding width, and the heads of a generator (`mlm`) and a discriminator
(`rtd`: was this token replaced?).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fmjax import contracts
from fmjax.contracts import Value
from fmjax.layers.heads import Features, HeadTable, linear_head
from fmjax.layers.linear import Dense, Initializer, normal
from fmjax.layers.mlp import activation
from fmjax.models import bert
from fmjax.models.sizes import resolve

SIZES: dict[str, dict[str, int]] = {
    "small": {
        "width": 256,
        "layers": 12,
        "attention_heads": 4,
        "mlp_width": 1024,
        "embedding_width": 128,
    },
    "base": bert.SIZES["base"],
    "large": bert.SIZES["large"],
}


@dataclasses.dataclass(frozen=True)
class Settings(bert.Settings):
    """BERT's settings, and the dropout rate of the multiple-choice head."""

    choice_dropout: float = 0.1


class ReplacedToken(nn.Module):
    """The discriminator's head: dense, activation and one logit per token, positive if it was
    replaced."""

    activation: Callable[[jax.Array], jax.Array]
    reads_pooled: ClassVar[bool] = False
    classes: int = 1
    kernel_init: Initializer = normal(0.02)
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Features, batch: Features) -> jax.Array:
        """Returns logits [B,L] in fp32."""
        x = features["hidden"]
        x = self.activation(
            Dense(x.shape[-1:], ("embed", None), self.kernel_init, dtype=self.dtype, name="dense")(
                x
            )
        )
        return linear_head(self, x).reshape(x.shape[:-1])


def heads_of(settings: Settings) -> HeadTable:
    """Returns a factory for each kind of head."""
    init, dtype = normal(settings.initializer_range), jnp.dtype(settings.dtype)
    choice_dropout = settings.choice_dropout
    return {
        "mlm": bert.masked_lm(settings, "gelu"),
        "rtd": partial(
            ReplacedToken, activation(settings.activation), kernel_init=init, dtype=dtype
        ),
        "classify": bert.classify_first(
            settings, "gelu", input_dropout=settings.classifier_dropout
        ),
        "choice": bert.classify_first(
            settings, "gelu", input_dropout=0.0, classes=1, dropout=choice_dropout
        ),
        **bert.common_heads(settings),
    }


def build(*, heads: contracts.Heads, size: str = "base", **settings: Value) -> bert.Bert:
    """Returns an ELECTRA of a named size (SIZES) with the given heads; see `bert.build`."""
    return bert.checked_model(bert.Bert(heads, resolve(Settings, SIZES, size, settings), heads_of))


INPUTS, checked_batch = bert.INPUTS, bert.checked_batch
