"""What tasks share whose model writes: the language-model head predicts each of `labels [B,T]` that has a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from fmjax import losses
from fmjax.data.sources.open import Source, check_columns
from fmjax.metrics import classes as class_metrics
from fmjax.tasks import Batch

# What `counted` is of a task with an encoder and a decoder.
BOTH_SIDES = ("attention_mask", "label_weights")


class TokenTask:
    """Loss and metrics of the labels of a batch, of which `label_weights [B,T]` says which count."""

    heads: ClassVar[dict[str, dict[str, Any]]] = {"lm": {}}

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Returns the number of predicted tokens in the batch."""
        return {"lm": batch["label_weights"].sum()}

    def loss(self, outputs: Batch, batch: Batch) -> dict[str, jax.Array]:
        """Returns the sum of the cross-entropies of predicted tokens."""
        return {"lm": (losses.softmax_cross_entropy(outputs["lm"], batch["labels"]) * batch["label_weights"]).sum()}

    def predictions(self, outputs: Batch, batch: Batch) -> dict[str, jax.Array]:
        """Returns per-row sums over predicted tokens: cross-entropies, their number, and how many are right."""
        weights, labels = batch["label_weights"], batch["labels"]
        tokens = losses.softmax_cross_entropy(outputs["lm"], labels)
        correct = (outputs["lm"].argmax(axis=-1) == labels) * weights
        return {"losses": (tokens * weights).sum(-1), "weights": weights.sum(-1), "correct": correct.sum(-1)}

    def metrics(self, arrays: Mapping[str, np.ndarray], valid: np.ndarray, examples: Any) -> dict[str, float]:
        """Returns loss (nats a predicted token), perplexity and accuracy."""
        return class_metrics.token_level(arrays["losses"], arrays["weights"], arrays["correct"], valid)


class CorpusToText(TokenTask):
    """A task that damages the texts of one column, and whose predicting writes."""

    column: str
    max_new_tokens: int
    num_beams: int
    counted: ClassVar[tuple[str, ...]] = BOTH_SIDES

    @property
    def generation(self) -> dict[str, Any]:
        """Arguments of generation, which predicting needs and evaluation does not."""
        return {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}

    def resolve(self, source: Source) -> dict[str, Any]:
        """Returns no settings: none follow from the data. Raises UserError if the text column is not there."""
        check_columns(source, (self.column,))
        return {}
