"""Attention kernels against the plain path: errors of values and gradients, and times."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmjax.bench.device.job import Job
from fmjax.bench.device.rows import FAILED, PASSED, Row, failed, skipped
from fmjax.contracts import PyTree
from fmjax.hardware import explanation
from fmjax.layers.bias import RelativeBias
from fmjax.layers.kernels.call import Call
from fmjax.layers.kernels.choice import KERNELS, PLAIN
from fmjax.layers.kernels.plain import attend
from fmjax.layers.mask import Mask

DTYPES = ("float32", "bfloat16")
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
# Bounds of errors, relative to the largest value. Products that XLA makes are exact to fp32 when
# asked to be; a Pallas kernel on a chip multiplies fp32 in TF32 or in passes of bf16.
BOUNDS = {"float32": 2e-5, "bfloat16": 4e-2}
INSIDE = 2e-2  # fp32 in a Pallas kernel on a chip
LENGTHS, TOKENS, HEADS, WIDTH = (512, 2048, 8192), 2**14, 12, 64  # of the times
TIMED = 0.15  # seconds of a timed run


@dataclasses.dataclass(frozen=True)
class Case:
    """What is asked of a kernel."""

    name: str
    causal: bool = False
    window: int = 0
    segments: bool = False
    padding: bool = False
    bias: bool = False
    distances: bool = False  # a bias of distances, as T5 has it
    groups: int = 0  # key heads; 0: as many as query heads
    odd: bool = False  # a length that is no multiple of a block


CASES = (
    Case("every key"),
    Case("causal", causal=True),
    Case("padding", padding=True),
    Case("causal, segments", causal=True, segments=True),
    Case("causal, window", causal=True, window=100),
    Case("a bias", bias=True),
    Case("a bias of distances, segments", distances=True, segments=True),
    Case("causal, 1 key head of 4", causal=True, groups=1),
    Case("odd length, padding", padding=True, odd=True),
)


def run(job: Job) -> Iterator[Row]:
    """Yields the rows of the errors, or of the times."""
    with interpreted(job.platform == "cpu"):
        yield from errors(job) if job.argument == "errors" else times(job)


@contextmanager
def interpreted(wanted: bool) -> Iterator[None]:
    """Runs Pallas kernels step by step in the block, as their machine is not here."""
    from jax.experimental import pallas

    call: Any = pallas.pallas_call
    if wanted:
        pallas.pallas_call = lambda *args, **options: call(*args, **options | {"interpret": True})
    try:
        yield
    finally:
        pallas.pallas_call = call


def names(platform: str) -> list[str]:
    """Returns the kernels that one device of a platform has; for a CPU, all that can be
    interpreted."""
    alone = {name: kernel for name, kernel in KERNELS.items() if name != "ring"}
    if platform == "cpu":
        return [name for name in alone if name != "cudnn"]
    return [name for name, kernel in alone.items() if kernel.platform in ("", platform)]


def errors(job: Job) -> Iterator[Row]:
    """Yields a row for each case and kernel."""
    kernels = names(job.platform)
    left = [(case, name) for case in CASES for name in kernels]
    longest, exact = 0.0, {}
    while left and job.left > longest:
        (case, name), begun = left.pop(0), time.monotonic()
        what = f"{name}, {case.name}"
        try:
            if name == kernels[0]:
                # A rehearsal shows that both types run; what is interpreted compiles slowly.
                dtypes = DTYPES if job.platform != "cpu" or case is CASES[0] else DTYPES[:1]
                exact = {dtype: Exact.of(made(case, job.platform, dtype)) for dtype in dtypes}
            yield compared(what, name, exact, job.platform)
        except Exception as error:
            yield failed(what, error)
        longest = max(longest, time.monotonic() - begun)
    if left:
        yield skipped("other cases", f"{len(left)} not run: no time was left")


@dataclasses.dataclass(frozen=True)
class Exact:
    """A call, and what the plain path computes of it in fp32 with full products."""

    call: Call
    out: jax.Array
    gradient: dict[str, jax.Array]

    @staticmethod
    def of(call: Call) -> Exact:
        arrays = {name: array.astype(jnp.float32) for name, array in inputs(call).items()}
        with jax.default_matmul_precision("highest"):
            (_, out), gradient = value_and_gradient(plain, call)(arrays)
        return Exact(call, out, gradient)

    def errors(self, function: Callable[[Call], jax.Array]) -> tuple[float, float]:
        """Returns the errors of a kernel's values and gradients, relative to the largest of each
        array."""
        full = "highest" if self.call.q.dtype == jnp.float32 else "default"
        with jax.default_matmul_precision(full):
            (_, out), own = value_and_gradient(function, self.call)(inputs(self.call))
        slopes = (error(own[name], wanted) for name, wanted in self.gradient.items())
        return error(out, self.out), max(slopes)


def compared(what: str, name: str, exact: dict[str, Exact], platform: str) -> Row:
    """Returns the row of one kernel and case, in both types of numbers."""
    kernel = KERNELS[name]
    shown, bounds, held, found = [], [], True, {}
    for dtype, wanted in exact.items():
        if why := kernel.refusal(wanted.call):
            shown.append(f"{SHORT[dtype]} not offered ({why.partition(';')[0]})")
            continue
        out, gradient = wanted.errors(kernel.attend)
        on_chip = platform != "cpu" and kernel.platform != ""
        bound = INSIDE if on_chip and dtype == "float32" else BOUNDS[dtype]
        held = held and out <= bound and gradient <= bound
        found[dtype] = {"forward": out, "gradient": gradient, "bound": bound}
        shown.append(f"{SHORT[dtype]} {out:.0e}, gradient {gradient:.0e}")
        bounds.append(f"<= {bound:.0e}")
    if not found:
        return skipped(what, "; ".join(dict.fromkeys(shown)))
    return Row(what, "; ".join(shown), ", ".join(bounds), PASSED if held else FAILED, found)


def made(case: Case, platform: str, dtype: str) -> Call:
    """Returns the call of a case, 2 rows and 4 heads."""
    rows, heads = 2, 4
    length, width = (160, 16) if platform == "cpu" else (512, 64)
    length -= 23 if case.odd else 0
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q = draw(rows, length, heads, width)
    k, v = (draw(rows, length, case.groups or heads, width) for _ in range(2))
    bias: jax.Array | RelativeBias | None = None
    if case.bias:
        bias = draw(1, heads, length, length).astype(jnp.float32)
    if case.distances:
        bias = RelativeBias(draw(32, heads).astype(jnp.float32))
    places = np.arange(length)
    keys = places[None] < np.array([[length], [length - 37]]) if case.padding else None
    segments = np.stack([places // 60, places // 41]) if case.segments else None
    own = None if segments is None else jnp.asarray(segments, jnp.int32)
    mask = Mask(
        None if keys is None else jnp.asarray(keys), own, own, causal=case.causal,
        window=case.window,
    )  # fmt: skip
    return Call(q, k, v, mask, width**-0.5, bias)


def plain(call: Call) -> jax.Array:
    """Returns what the plain path computes."""
    seen = call.mask.dense(*call.lengths)
    return attend(
        call.q, call.k, call.v, seen, lambda weights: weights, call.scale, call.dense_bias()
    )


def inputs(call: Call) -> dict[str, jax.Array]:
    """Returns the arrays by which a call is differentiated."""
    bias = call.bias.table if isinstance(call.bias, RelativeBias) else call.bias
    arrays = {"q": call.q, "k": call.k, "v": call.v, "bias": bias}
    return {name: array for name, array in arrays.items() if array is not None}


def with_inputs(call: Call, arrays: dict[str, jax.Array]) -> Call:
    """Returns a call with other `inputs`."""
    bias: jax.Array | RelativeBias | None = arrays.get("bias")
    if isinstance(call.bias, RelativeBias):
        bias = dataclasses.replace(call.bias, table=arrays["bias"])
    return dataclasses.replace(call, q=arrays["q"], k=arrays["k"], v=arrays["v"], bias=bias)


def value_and_gradient(function: Callable[[Call], jax.Array], call: Call) -> PyTree:
    """Returns a compiled function of `inputs`: attention's values and a loss's gradient."""
    real = jnp.ones((), bool) if call.mask.keys is None else call.mask.keys[:, :, None, None]

    def loss(arrays: PyTree) -> tuple[jax.Array, jax.Array]:
        out = function(with_inputs(call, arrays)).astype(jnp.float32)
        out = jnp.where(real, out, 0)
        return jnp.sum(jnp.sin(out + 0.5)), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def error(found: jax.Array, wanted: jax.Array) -> float:
    """Returns the largest difference over the largest value; infinity for NaN."""
    a, b = (np.asarray(array, np.float32) for array in (found, wanted))
    largest = float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
    return largest if np.isfinite(largest) else float("inf")


def times(job: Job) -> Iterator[Row]:
    """Yields the times of causal attention with its gradient in bf16, each kernel's beside the
    plain path's, for a constant number of tokens."""
    small = job.platform == "cpu"
    offered = ["chunked"] if small else names(job.platform)
    for length in (64, 128) if small else LENGTHS:
        shape = (
            (256 // length, length, 2, 16) if small else (TOKENS // length, length, HEADS, WIDTH)
        )
        call = ordinary(shape)
        base = None
        for name in (PLAIN, *offered):
            what = f"time of {name}, {length:,} tokens"
            if job.left < 3:
                yield skipped(what, "no time was left")
                continue
            if name != PLAIN and (why := KERNELS[name].refusal(call)):
                yield skipped(what, why)
                continue
            try:
                spent = seconds(plain if name == PLAIN else KERNELS[name].attend, call, small)
            except Exception as error:
                # At which length the plain path runs out of memory is a result.
                said = explanation(error) if name == PLAIN else None
                yield Row(what, said.partition(";")[0]) if said else failed(what, error)
                continue
            base = spent if name == PLAIN else base
            against = (
                "" if base is None or name == PLAIN else f"{base / spent:.2f} x as fast as xla"
            )
            facts = {"seconds": spent, "xla_seconds": base}
            yield Row(what, f"{1e3 * spent:.3g} ms with its gradient", against, facts=facts)


def ordinary(shape: tuple[int, int, int, int]) -> Call:
    """Returns a causal call in bf16."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16) for _ in range(3))
    return Call(q, k, v, Mask(causal=True), shape[-1] ** -0.5)


def seconds(function: Callable[[Call], jax.Array], call: Call, brief: bool) -> float:
    """Returns the median time of a call with its gradient, over runs of several calls."""
    step, arrays = value_and_gradient(function, call), inputs(call)

    def timed(count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            result = step(arrays)
        jax.block_until_ready(result)
        return (time.perf_counter() - begun) / count

    timed(2)
    count = 1 if brief else max(1, min(200, round(TIMED / timed(2))))
    return statistics.median(timed(count) for _ in range(3))
