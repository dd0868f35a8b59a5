"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108), following Hugging Face's
`modeling_distilbert.py`.

BERT with half the layers, without token types and pooler. In training, the reference has no dropout
on the output of attention; here `dropout` also applies there, as in BERT.
"""

from __future__ import annotations

import dataclasses
from functools import partial

from fmjax import contracts
from fmjax.contracts import Value
from fmjax.layers.heads import HeadTable, Tag
from fmjax.layers.linear import normal
from fmjax.models import bert
from fmjax.models.sizes import resolve

SIZES = {"base": bert.SIZES["base"] | {"layers": 6}}


@dataclasses.dataclass(frozen=True)
class Settings(bert.Settings):
    """BERT's settings with DistilBERT's values."""

    token_types: int = 0
    classifier_dropout: float = 0.2
    span_dropout: float = 0.1


def heads_of(settings: Settings) -> HeadTable:
    """Returns a factory for each kind of head."""
    init = normal(settings.initializer_range)
    return {
        **bert.common_heads(settings),
        "mlm": bert.masked_lm(settings, settings.activation),
        "classify": bert.classify_first(settings, "relu", input_dropout=0.0),
        "choice": bert.classify_first(settings, "relu", input_dropout=0.0, classes=1),
        "tag": partial(Tag, dropout=settings.dropout, kernel_init=init),
        "span": partial(Tag, classes=2, dropout=settings.span_dropout, kernel_init=init),
    }


def build(*, heads: contracts.Heads, size: str = "base", **settings: Value) -> bert.Bert:
    """Returns a DistilBERT of a named size (SIZES) with the given heads; see `bert.build`."""
    return bert.checked_model(bert.Bert(heads, resolve(Settings, SIZES, size, settings), heads_of))


INPUTS = ("input_ids", "attention_mask", "position_ids")
checked_batch = bert.checked_batch
