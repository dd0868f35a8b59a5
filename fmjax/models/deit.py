"""DeiT (Touvron et al. 2021, arXiv:2012.12877), following Hugging Face's `modeling_deit.py`.

ViT with a distillation token after the class token. DeiTs that were not distilled are plain ViTs,
also in Hugging Face.
"""

from __future__ import annotations

from functools import partial

from fmjax import contracts
from fmjax.contracts import Value
from fmjax.layers.heads import HeadTable
from fmjax.layers.linear import normal
from fmjax.models import vit
from fmjax.models.sizes import resolve
from fmjax.models.vit_heads import ClassifyDistilled

SIZES = {name: size for name, size in vit.SIZES.items() if name != "large"}
Settings = vit.Settings


TOKENS = ("class_token", "distillation_token")


def heads_of(settings: Settings, tokens: int) -> HeadTable:
    """Returns a factory for each kind of head."""
    vits, init = vit.heads_of(settings, tokens), normal(settings.initializer_range)
    return {
        "pooled": vits["pooled"],
        "classify": vits["classify"],
        "classify_distilled": partial(
            ClassifyDistilled, dropout=settings.classifier_dropout, kernel_init=init
        ),
    }


def build(*, heads: contracts.Heads, size: str = "base", **settings: Value) -> vit.Vit:
    """Returns a DeiT of a named size (SIZES) with the given heads; see `vit.build`."""
    return vit.checked_model(
        vit.Vit(heads, resolve(Settings, SIZES, size, settings), TOKENS, heads_of)
    )


INPUTS, checked_batch, fit_params = vit.INPUTS, vit.checked_batch, vit.fit_params
