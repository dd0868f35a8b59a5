"""fmjax: Transformer foundation models in JAX.

`fmjax.load(path)` gives a model from a run or a Hugging Face folder; `fmjax.fit(config, workdir)` trains one.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "fit", "load"]


def __getattr__(name: str) -> Any:
    # JAX and Flax take a second to import: not before they are needed.
    if name == "load":
        from fmjax.inference.pretrained import load

        return load
    if name == "fit":
        from fmjax.train.fit import fit

        return fit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
