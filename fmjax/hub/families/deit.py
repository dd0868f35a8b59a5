"""DeiT in Hugging Face, `DeiTConfig` and `DeiTModel`; DeiTs that were not distilled are ViTs there,
too."""

from __future__ import annotations

import dataclasses

from fmjax.hub.families import vit
from fmjax.hub.rules import AS_IS, Rule, linear, under

REFERENCE = dataclasses.replace(
    vit.REFERENCE,
    model_types=("deit",),
    architectures={
        "DeiTModel": {"pooled": "pooler_output"},
        "DeiTForImageClassification": {"classify": "logits"},
        "DeiTForImageClassificationWithTeacher": {"classify_distilled": "logits"},
    },
    prefix="deit.",
    weights=(
        *under("", "deit", vit.BODY),
        Rule("embed/distillation_token", "deit.embeddings.distillation_token", AS_IS),
        *linear("head/classify", "classifier"),
        *linear("head/classify_distilled/class_token", "cls_classifier"),
        *linear("head/classify_distilled/distillation_token", "distillation_classifier"),
    ),
    variants=(),
)
