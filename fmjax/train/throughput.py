"""How fast a run goes, against what its devices could do."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

# Dense bf16 peaks in FLOP/s from the makers' data sheets, by a part of JAX's `device_kind`.
PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "TPU v6": 918e12,
    "TPU v5p": 459e12,
    "TPU v5": 197e12,
    "TPU v4": 275e12,
}


def peak_flops() -> tuple[float, str]:
    """Returns the peak FLOP/s of all devices together, and where the figure comes from.

    A data sheet gives it for accelerators; for a CPU, or a kind not listed, it is the best of five fp32 matrix products of
    1024 x 1024 timed here and now (some milliseconds).
    """
    kind = jax.devices()[0].device_kind
    for name, peak in PEAKS.items():
        if name.lower() in kind.lower():
            return peak * jax.device_count(), f"data sheet of {kind}"
    size = 1024
    x = jnp.ones((size, size))
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    # The fake devices of one CPU share its cores, so they are not counted.
    return 2 * size**3 / best, f"fp32 matrix product timed on {kind}"
