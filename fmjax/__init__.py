"""fmjax: Transformer foundation models in JAX. `fmjax.load(path)` gives a model from a run or a Hugging Face folder."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # JAX and Flax take a second to import: not before they are needed.
    if name == "load":
        from fmjax.pretrained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
