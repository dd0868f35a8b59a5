"""DeiT (Touvron et al. 2021, arXiv:2012.12877), following Hugging Face's `modeling_deit.py`.

ViT with a distillation token after the class token. DeiTs that were not distilled are plain ViTs, in Hugging Face too.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from fmjax import contracts
from fmjax.layers.heads import HeadTable
from fmjax.layers.linear import normal
from fmjax.models import vit
from fmjax.models.sizes import resolve
from fmjax.models.vit_heads import ClassifyDistilled

SIZES = {name: size for name, size in vit.SIZES.items() if name != "large"}
Settings = vit.Settings


TOKENS = ("class_token", "distillation_token")


def heads_of(settings: Settings, tokens: int) -> HeadTable:
    """Returns the builder of each kind of head."""
    vits, init = vit.heads_of(settings, tokens), normal(settings.initializer_range)
    return {
        "pooled": vits["pooled"],
        "classify": vits["classify"],
        "classify_distilled": partial(ClassifyDistilled, dropout=settings.classifier_dropout, kernel_init=init),
    }


def build(*, heads: contracts.Heads, size: str = "base", **settings: Any) -> vit.Vit:
    """Returns a DeiT of a named size (SIZES) with the given heads; see `vit.build`."""
    return vit.checked_model(vit.Vit(heads, resolve(Settings, SIZES, size, settings), TOKENS, heads_of))


MODEL_TYPES = ("deit",)
PREFIX = "deit."
ARCHITECTURES: dict[str, dict[str, str]] = {
    "DeiTModel": {"pooled": "pooler_output"},
    "DeiTForImageClassification": {"classify": "logits"},
    "DeiTForImageClassificationWithTeacher": {"classify_distilled": "logits"},
}
INPUTS = vit.INPUTS
SETTINGS: vit.Table = {**vit.SETTINGS, **vit.POOLER}
WEIGHTS: dict[str, str] = {ours: PREFIX + theirs for ours, theirs in vit.BODY.items()} | {
    "embed/distillation_token": "deit.embeddings.distillation_token",
    "head/classify/kernel": "classifier.weight",
    "head/classify/bias": "classifier.bias",
    "head/classify_distilled/class_token/kernel": "cls_classifier.weight",
    "head/classify_distilled/class_token/bias": "cls_classifier.bias",
    "head/classify_distilled/distillation_token/kernel": "distillation_classifier.weight",
    "head/classify_distilled/distillation_token/bias": "distillation_classifier.bias",
}
TIED: dict[str, str] = {}


def from_reference(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings for `build` of a reference config. Raises UserError naming each setting not handled."""
    return vit.read_settings(config, SETTINGS)


def to_reference(settings: Settings, pad_id: int | None = None) -> dict[str, Any]:
    """Returns the reference config of settings. Raises UserError naming each that the reference cannot express."""
    return vit.to_reference(settings) | {"model_type": MODEL_TYPES[0]}


fit_params = vit.fit_params
reference_inputs = vit.reference_inputs
