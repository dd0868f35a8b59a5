"""Functions that are cheaper to compute again than to store: norms, activations, dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax

from fmjax.layers.kernels.call import target

Function: TypeAlias = Callable[..., jax.Array]


def recomputed(function: Function) -> Function:
    """Returns a function whose backward pass needs its arguments only, and computes the rest again.

    Otherwise scanned layers store all that it makes on the way, such as four arrays of its
    argument's size for a GELU. In unrolled layers the compiler sees both computations and decides
    which to keep. On a CPU, where computing takes longer than reading, the function is returned as
    it is.
    """
    if target().platform == "cpu":
        return function
    again: Function = jax.checkpoint(function, prevent_cse=False)
    return again
