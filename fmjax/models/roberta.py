"""RoBERTa (Liu et al. 2019, arXiv:1907.11692), following Hugging Face's `modeling_roberta.py`; also
XLM-R and CamemBERT.

BERT with positions that start after the padding id, a different classifier, and no next-sentence
head.
"""

from __future__ import annotations

import dataclasses
from functools import partial

from fmjax import contracts
from fmjax.contracts import Config, Value
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.layers.heads import Classify, HeadTable, Pooled
from fmjax.layers.linear import normal
from fmjax.models import bert
from fmjax.models.sizes import resolve

SIZES = bert.SIZES


@dataclasses.dataclass(frozen=True)
class Settings(bert.Settings):
    """BERT's settings with RoBERTa's values. `position_offset` is the padding id + 1: the
    reference's first position."""

    position_offset: int = 2
    token_types: int = 1
    epsilon: float = 1e-5


def heads_of(settings: Settings) -> HeadTable:
    """Returns a factory for each kind of head."""
    init, dropout = normal(settings.initializer_range), settings.classifier_dropout
    return {
        "pooled": Pooled,
        "mlm": bert.masked_lm(settings, "gelu"),
        "classify": bert.classify_first(settings, "tanh", input_dropout=dropout),
        "choice": partial(Classify, classes=1, dropout=dropout, kernel_init=init),
        **bert.common_heads(settings),
    }


def build(*, heads: contracts.Heads, size: str = "base", **settings: Value) -> bert.Bert:
    """Returns a RoBERTa of a named size (SIZES) with the given heads; see `bert.build`."""
    return bert.checked_model(bert.Bert(heads, resolve(Settings, SIZES, size, settings), heads_of))


INPUTS, checked_batch = bert.INPUTS, bert.checked_batch


def settings_from_tokenizer(tokenizer: Tokenizer) -> Config:
    """Returns the settings of a new model that its tokenizer determines: with another offset, it
    could not be exported."""
    return {"position_offset": tokenizer.pad_id + 1}
