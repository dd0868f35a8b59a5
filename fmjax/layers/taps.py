"""Values inside a model that a caller can read or perturb through two of Linen's collections.

- `apply(..., mutable=["intermediates"])` returns the values, each at its module's path and, in a
  stack of layers, under the layer's index: `encoder/layers/3/hidden` [B,L,D],
  `encoder/layers/3/attention/weights` [B,H,L,S].
- `variables["perturbations"]` is added to them. It may have any part of the same tree. With zeros,
  it provides gradients with respect to hidden states. `apply(..., mutable=["perturbations"])`
  returns zeros for all values.

Without these collections, nothing is traced. A batch entry `embedded_delta` is added to the
embedded input.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

INTERMEDIATES, PERTURBATIONS = COLLECTIONS = ("intermediates", "perturbations")


def written_collections(module: nn.Module) -> tuple[str, ...]:
    """Returns the requested collections of taps; none during initialization."""
    if module.is_initializing():
        return ()
    return tuple(name for name in COLLECTIONS if module.is_mutable_collection(name))


def is_tapped(module: nn.Module, name: str) -> bool:
    """Returns whether the caller reads or changes a value."""
    return bool(written_collections(module)) or module.has_variable(PERTURBATIONS, name)


def tap(module: nn.Module, name: str, value: jax.Array) -> jax.Array:
    """Returns a value plus its perturbation, if any, and stores it if requested."""
    written = written_collections(module)
    if module.has_variable(PERTURBATIONS, name):
        value = value + module.get_variable(PERTURBATIONS, name)
    elif PERTURBATIONS in written:
        module.put_variable(PERTURBATIONS, name, jnp.zeros_like(value))
    if INTERMEDIATES in written:
        module.put_variable(INTERMEDIATES, name, value)
    return value


def add_delta(x_BLD: jax.Array, batch: Mapping[str, jax.Array], prefix: str = "") -> jax.Array:
    """Returns the embedded input plus the batch's `embedded_delta [B,L,D]`, whose name is prefixed
    by `prefix`, if present."""
    name = f"{prefix}embedded_delta"
    return x_BLD + batch[name].astype(x_BLD.dtype) if name in batch else x_BLD
