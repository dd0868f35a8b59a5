"""fmjax: Transformer foundation models in JAX.

    fmjax.fit(config, workdir, overrides) trains what a config file describes, or continues it
    fmjax.load(path) a model from a run or a Hugging Face folder fmjax.evaluate(workdir, split) the
    metrics of a run on a split fmjax.convert(source, target) a run to a Hugging Face folder, or
    back fmjax.plan(config, topology) resources of a step on hardware that you do not have

These and what config files import are public; everything else is internal and may change.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmjax.inference.convert import convert
    from fmjax.inference.evaluate import evaluate_run as evaluate
    from fmjax.inference.load import load
    from fmjax.planning.plan import plan_config as plan
    from fmjax.train.fit import fit

__version__ = "0.1.0"
__all__ = ["__version__", "convert", "evaluate", "fit", "load", "plan"]

# JAX and Flax take a second to import: they are imported when first needed.
PLACES = {
    "convert": ("fmjax.inference.convert", "convert"),
    "evaluate": ("fmjax.inference.evaluate", "evaluate_run"),
    "fit": ("fmjax.train.fit", "fit"),
    "load": ("fmjax.inference.load", "load"),
    "plan": ("fmjax.planning.plan", "plan_config"),
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, function = PLACES[name]
    return getattr(importlib.import_module(module), function)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
