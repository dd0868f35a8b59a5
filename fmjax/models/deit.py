"""DeiT (Touvron et al. 2021, arXiv:2012.12877), following Hugging Face's `modeling_deit.py`.

ViT with a distillation token behind the class token. DeiTs that were not distilled are plain ViTs, in Hugging Face too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn

from fmjax.layers.linear import normal
from fmjax.models import vit
from fmjax.models.sizes import checked, resolve
from fmjax.models.vit_heads import ClassifyDistilled

SIZES = {name: size for name, size in vit.SIZES.items() if name != "large"}
Settings = vit.Settings


class Deit(vit.Vit):
    """A ViT with the distillation token, and the classifier that reads it."""

    tokens: tuple[str, ...] = ("class_token", "distillation_token")

    def head_makers(self) -> dict[str, Callable[..., nn.Module]]:
        """Returns, for each kind of head, what builds it."""
        s = self.settings
        makers = super().head_makers()
        del makers["pixels"]
        init = normal(s.initializer_range)
        return makers | {"classify_distilled": partial(ClassifyDistilled, dropout=s.classifier_dropout, kernel_init=init)}


def build(*, heads: Mapping[str, Mapping[str, Any]], size: str = "base", **settings: Any) -> Deit:
    """Returns a DeiT of a named size (SIZES) with the given heads; see `vit.build`."""
    return vit.check_sizes(checked(Deit(heads, resolve(Settings, SIZES, size, settings))))


INPUTS, checked_batch, fit_params = vit.INPUTS, vit.checked_batch, vit.fit_params
