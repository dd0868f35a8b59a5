"""RoBERTa (Liu et al. 2019, arXiv:1907.11692), following Hugging Face's `modeling_roberta.py`; XLM-R and CamemBERT too.

BERT with positions that begin after the padding id, another classifier, and no next-sentence head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.models import bert
from fmjax.models.sizes import checked, resolve

SIZES = bert.SIZES


@dataclasses.dataclass(frozen=True)
class Settings(bert.Settings):
    """BERT's settings with RoBERTa's values. `position_offset` is the padding id + 1: where the reference begins to count."""

    position_offset: int = 2
    token_types: int = 1
    epsilon: float = 1e-5


class Roberta(bert.Bert):
    """A BERT with RoBERTa's heads."""

    def head_makers(self) -> dict[str, Callable[..., nn.Module]]:
        """Returns, for each kind of head, what builds it."""
        makers = super().head_makers()
        del makers["nsp"]
        classify = self.classify_first("tanh", input_dropout=self.settings.classifier_dropout)
        return makers | {"mlm": self.masked_lm("gelu"), "classify": classify}


def build(*, heads: Mapping[str, Mapping[str, Any]], size: str = "base", **settings: Any) -> Roberta:
    """Returns a RoBERTa of a named size (SIZES) with the given heads; see `bert.build`."""
    return checked(Roberta(heads, resolve(Settings, SIZES, size, settings)))


INPUTS, checked_batch = bert.INPUTS, bert.checked_batch


def settings_from_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the settings of a fresh model that follow from its tokenizer: with another offset it could not be exported."""
    return {"position_offset": tokenizer.pad_id + 1}
