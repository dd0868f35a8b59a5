"""What the TPU compiler says of attention's gradient, by kernel: memory for temporaries and bytes
moved. No chip is needed; libtpu is: `python -m fmjax.bench.kernels v5e:2x2`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from fmjax.bench.table import markdown
from fmjax.contracts import PyTree
from fmjax.errors import one_line
from fmjax.layers.bias import RelativeBias
from fmjax.layers.kernels.call import Call, lowered_for
from fmjax.layers.kernels.choice import KERNELS, PLAIN
from fmjax.layers.kernels.plain import attend
from fmjax.layers.mask import Mask
from fmjax.planning.topology import read_topology

ROWS, LENGTH, HEADS, WIDTH = 32, 512, 12, 64
# What is computed, always with segments: causal, a window, the shape of what the bias is made of,
# an array [1,H,L,L] or T5's 32 distances; and by which kernels.
Shape = tuple[int, ...]
ARRAY, DISTANCES = (1, HEADS, LENGTH, LENGTH), (32, HEADS)
CASES: dict[str, tuple[bool, int, Shape, tuple[str, ...]]] = {
    "all": (False, 0, (), (PLAIN, "chunked", "splash", "flash", "relative")),
    "causal": (True, 0, (), (PLAIN, "splash", "relative")),
    "window 128": (True, 128, (), (PLAIN, "splash")),
    "a bias": (False, 0, ARRAY, (PLAIN, "chunked", "flash")),
    "a bias of distances": (False, 0, DISTANCES, (PLAIN, "chunked", "flash", "relative")),
    "the same, causal": (True, 0, DISTANCES, (PLAIN, "flash", "relative")),
}


def gradient(kernel: str, causal: bool, window: int, biased: Shape, device: PyTree) -> PyTree:
    """Returns the compiled gradient of an attention with respect to all that has one."""
    place = SingleDeviceSharding(device)

    def shape(*sizes: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def loss(arrays: dict[str, jax.Array], segments: jax.Array) -> jax.Array:
        mask = Mask(None, segments, segments, causal=causal, window=window)
        q, k, v = (arrays[name] for name in ("q", "k", "v"))
        given = arrays.get("bias")
        bias: jax.Array | RelativeBias | None = given
        if given is not None and given.shape == DISTANCES:
            bias = RelativeBias(given, not causal)
        call = Call(q, k, v, mask, WIDTH**-0.5, bias)
        if kernel != PLAIN:
            return KERNELS[kernel].attend(call).astype(jnp.float32).sum()
        seen = mask.dense(LENGTH, LENGTH)
        added = call.dense_bias()
        out = attend(call.q, call.k, call.v, seen, lambda weights: weights, call.scale, added)
        return out.astype(jnp.float32).sum()

    each = shape(ROWS, LENGTH, HEADS, WIDTH, dtype=jnp.dtype("bfloat16"))
    arrays = {"q": each, "k": each, "v": each}
    if biased:
        arrays["bias"] = shape(*biased, dtype=jnp.dtype("float32"))
    with lowered_for("tpu"):
        segments = shape(ROWS, LENGTH, dtype=jnp.dtype("int32"))
        return jax.jit(jax.grad(loss)).lower(arrays, segments).compile()


def main(topologies: Sequence[str]) -> None:
    """Prints a table for each topology, such as v5e:2x2. Raises UserError for one that is not
    known."""
    for topology in topologies:
        device = read_topology(topology).devices()[0]
        rows = []
        for name, (causal, window, biased, kernels) in CASES.items():
            for kernel in kernels:
                try:
                    program = gradient(kernel, causal, window, biased, device)
                except jax.errors.JaxRuntimeError as error:
                    rows.append((name, kernel, one_line(error, 80), ""))
                    continue
                memory = program.memory_analysis().temp_size_in_bytes / 2**20
                moved = program.cost_analysis()["bytes accessed"] / 1e9
                rows.append((name, kernel, f"{memory:,.0f}", f"{moved:.2f}"))
        print(f"{topology}, {ROWS} x {LENGTH} x {HEADS} x {WIDTH}, bfloat16, with segments")
        print(markdown(("mask", "kernel", "temporaries, MiB", "bytes moved, GB"), rows))


if __name__ == "__main__":
    main(sys.argv[1:])
