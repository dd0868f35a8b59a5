"""Compilation for tests that compile more than they run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

# The older of XLA's two ways to compile fusions on a CPU takes less time; newer versions of jax
# have only the other.
OLDER_FUSIONS = {"xla_cpu_use_fusion_emitters": False}


@functools.cache
def fast_options() -> dict[str, bool]:
    """Returns the options that shorten compilation, of those that the installed jax has."""
    try:
        jax.jit(lambda: 0, compiler_options=OLDER_FUSIONS).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return {}
    return OLDER_FUSIONS


def fast_jit(function: Callable[..., Any], **settings: Any) -> Any:
    """Returns `jax.jit(function, **settings)`, compiled in less time."""
    return jax.jit(function, compiler_options=fast_options(), **settings)
