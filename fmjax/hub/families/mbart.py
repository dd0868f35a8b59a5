"""mBART in Hugging Face, `MBartConfig` and `MBartModel`."""

from __future__ import annotations

from fmjax.contracts import Config
from fmjax.hub.families import bart, fairseq
from fmjax.hub.reference import Reference
from fmjax.hub.rules import norm
from fmjax.models.transformer import INPUTS


def complete(config: Config, settings: Config) -> Config:
    """Returns all settings.

    If the config has no start token (in mBART, the target language), decoding starts from the end
    token.
    """
    return settings | fairseq.tokens(config, start=None, end=2)


REFERENCE = Reference(
    model_types=("mbart",),
    architectures={"MBartModel": {}, "MBartForConditionalGeneration": {"lm": "logits"}},
    inputs=INPUTS,
    settings=fairseq.SETTINGS,
    fixed={**bart.FIXED, "normalize_before": True, "add_final_layer_norm": True},
    unread=fairseq.UNREAD,
    constants=bart.CONSTANTS,
    complete=complete,
    express=bart.express,
    prefix="model.",
    weights=(
        *bart.WEIGHTS,
        *norm("encoder/final_norm", "model.encoder.layer_norm"),
        *norm("decoder/final_norm", "model.decoder.layer_norm"),
    ),
    tied=fairseq.TIED,
)
