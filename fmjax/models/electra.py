"""ELECTRA (Clark et al. 2020, arXiv:2003.10555), following Hugging Face's `modeling_electra.py`.

BERT with embeddings of their own width, and the heads of a generator (`mlm`) and a discriminator (`rtd`: was this token
replaced?).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fmjax import contracts
from fmjax.hub import folders
from fmjax.layers.heads import Features, HeadTable, linear_head
from fmjax.layers.linear import Dense, Initializer, normal
from fmjax.layers.mlp import activation
from fmjax.models import bert
from fmjax.models.sizes import resolve

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
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Features, batch: Features) -> jax.Array:
        """Returns logits [B,L] in fp32."""
        x = features["hidden"]
        x = self.activation(Dense(x.shape[-1:], ("embed", None), self.kernel_init, dtype=self.dtype, name="dense")(x))
        return linear_head(self, x).reshape(x.shape[:-1])


def heads_of(settings: Settings) -> HeadTable:
    """Returns the builder of each kind of head."""
    init, dtype = normal(settings.initializer_range), jnp.dtype(settings.dtype)
    choice_dropout = settings.choice_dropout
    return {
        "mlm": bert.masked_lm(settings, "gelu"),
        "rtd": partial(ReplacedToken, activation(settings.activation), kernel_init=init, dtype=dtype),
        "classify": bert.classify_first(settings, "gelu", input_dropout=settings.classifier_dropout),
        "choice": bert.classify_first(settings, "gelu", input_dropout=0.0, classes=1, dropout=choice_dropout),
        **bert.common_heads(settings),
    }


def build(*, heads: contracts.Heads, size: str = "base", **settings: Any) -> bert.Bert:
    """Returns an ELECTRA of a named size (SIZES) with the given heads; see `bert.build`."""
    return bert.checked_model(bert.Bert(heads, resolve(Settings, SIZES, size, settings), heads_of))


MODEL_TYPES = ("electra",)
PREFIX = "electra."
ARCHITECTURES: dict[str, dict[str, str | tuple[str, ...]]] = {
    "ElectraModel": {},
    "ElectraForMaskedLM": {"mlm": "logits"},
    "ElectraForPreTraining": {"rtd": "logits"},
    "ElectraForSequenceClassification": {"classify": "logits"},
    "ElectraForTokenClassification": {"tag": "logits"},
    "ElectraForQuestionAnswering": {"span": bert.SPAN},
    "ElectraForMultipleChoice": {"choice": ("logits",)},
}
INPUTS = bert.INPUTS
SETTINGS: bert.Table = {
    **bert.SETTINGS,
    "embedding_size": ("embedding_width", 128),
    "hidden_size": ("width", 256),
    "num_attention_heads": ("attention_heads", 4),
    "intermediate_size": ("mlp_width", 1024),
    "summary_last_dropout": ("choice_dropout", 0.1),
}
# The reference's sequence summary is what multiple choice reads.
FIXED = {**bert.FIXED, "summary_type": "first", "summary_use_proj": True, "summary_activation": "gelu"}
CONSTANTS = {"position_offset": 0}
WEIGHTS: dict[str, str] = bert.renamed({}, PREFIX, without=("encoder/pooler",)) | {
    **bert.SHARED,
    "embed/projection/kernel": PREFIX + "embeddings_project.weight",
    "embed/projection/bias": PREFIX + "embeddings_project.bias",
    "head/mlm/dense/kernel": "generator_predictions.dense.weight",
    "head/mlm/dense/bias": "generator_predictions.dense.bias",
    "head/mlm/norm/scale": "generator_predictions.LayerNorm.weight",
    "head/mlm/norm/bias": "generator_predictions.LayerNorm.bias",
    "head/mlm/bias": "generator_lm_head.bias",
    "head/rtd/dense/kernel": "discriminator_predictions.dense.weight",
    "head/rtd/dense/bias": "discriminator_predictions.dense.bias",
    "head/rtd/kernel": "discriminator_predictions.dense_prediction.weight",
    "head/rtd/bias": "discriminator_predictions.dense_prediction.bias",
    "head/classify/dense/kernel": "classifier.dense.weight",
    "head/classify/dense/bias": "classifier.dense.bias",
    "head/classify/kernel": "classifier.out_proj.weight",
    "head/classify/bias": "classifier.out_proj.bias",
    "head/choice/dense/kernel": "sequence_summary.summary.weight",
    "head/choice/dense/bias": "sequence_summary.summary.bias",
    "head/choice/kernel": "classifier.weight",
    "head/choice/bias": "classifier.bias",
}
TIED = {"generator_lm_head.weight": "embed/word/embedding"}


def from_reference(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings for `build` of a reference config. Raises UserError naming each setting not handled."""
    return bert.read_settings(config, SETTINGS, FIXED, CONSTANTS, ())


def to_reference(settings: Settings, pad_id: int | None = None) -> dict[str, Any]:
    """Returns the reference config of settings. Raises UserError naming each that the reference cannot express."""
    config = folders.write_settings(settings, SETTINGS, CONSTANTS)
    own = {"model_type": MODEL_TYPES[0], "pad_token_id": pad_id or 0}
    return config | own | {"embedding_size": settings.embedding_width or settings.width}


reference_inputs = bert.reference_inputs
