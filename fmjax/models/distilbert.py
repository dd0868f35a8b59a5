"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108), following Hugging Face's `modeling_distilbert.py`.

BERT with half the layers, without token types and pooler. In training, the reference has no dropout on the output of
attention; here `dropout` acts there too, as in BERT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn

from fmjax.models import bert
from fmjax.models.sizes import checked, resolve

SIZES = {"base": bert.SIZES["base"] | {"layers": 6}}


@dataclasses.dataclass(frozen=True)
class Settings(bert.Settings):
    """BERT's settings with DistilBERT's values."""

    token_types: int = 0
    classifier_dropout: float = 0.2
    span_dropout: float = 0.1


class DistilBert(bert.Bert):
    """A BERT with DistilBERT's heads."""

    settings: Settings

    def head_makers(self) -> dict[str, Callable[..., nn.Module]]:
        """Returns, for each kind of head, what builds it."""
        s = self.settings
        makers = super().head_makers()
        del makers["nsp"], makers["pooled"]
        classify = self.classify_first("relu", input_dropout=0.0)
        own: dict[str, Callable[..., nn.Module]] = {"classify": classify, "choice": partial(classify, classes=1)}
        own |= {"tag": partial(makers["tag"], dropout=s.dropout), "span": partial(makers["span"], dropout=s.span_dropout)}
        return makers | own


def build(*, heads: Mapping[str, Mapping[str, Any]], size: str = "base", **settings: Any) -> DistilBert:
    """Returns a DistilBERT of a named size (SIZES) with the given heads; see `bert.build`."""
    return checked(DistilBert(heads, resolve(Settings, SIZES, size, settings)))


INPUTS = ("input_ids", "attention_mask", "position_ids")
checked_batch = bert.checked_batch
