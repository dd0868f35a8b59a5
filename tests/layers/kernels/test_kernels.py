"""Every kernel gives the plain path's values and gradients, wherever a query has a key to attend to.

Letters as in `fmjax/layers/linear.py`; S keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fmjax.distributed.layout import Layout
from fmjax.distributed.sharding import RULES, make_mesh
from fmjax.layers.bias import RelativeBias
from fmjax.layers.kernels import chunked, gpu, relative, tpu
from fmjax.layers.kernels.call import Call
from fmjax.layers.kernels.plain import attend
from fmjax.layers.mask import Mask

TOLERANCE, WIDTH = 2e-6, 16
ROUNDINGS = 2  # see `exact`; the plain path itself has up to 0.9
KERNELS: dict[str, Callable[[Call], jax.Array]] = {
    "chunked": chunked.attend, "splash": tpu.splash, "flash": tpu.flash, "relative": relative.attend, "pallas_gpu": gpu.pallas,
}  # fmt: skip
REFUSALS = {
    "chunked": chunked.refusal, "splash": tpu.splash_refusal, "flash": tpu.flash_refusal, "relative": relative.refusal,
    "pallas_gpu": gpu.pallas_refusal,
}  # fmt: skip


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Runs Pallas kernels on the CPU, and divides into blocks what is as short as a test."""
    from jax.experimental import pallas

    call = pallas.pallas_call
    monkeypatch.setattr(pallas, "pallas_call", lambda *args, **options: call(*args, **{**options, "interpret": True}))
    monkeypatch.setattr(chunked, "BLOCK", 5)
    monkeypatch.setattr(relative, "SIZES", (8,))


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


Form = tuple[int, int] | str | None  # of a bias: its rows and heads, or "distances" or "distances, one way"


def made(length: int, keys: int = 7, heads: int = 2, groups: int | None = None, bias: Form = None) -> Call:
    """Returns a call of 2 rows, without a mask."""
    q, (k, v) = draw(2, length, heads, WIDTH), (draw(2, keys, groups or heads, WIDTH, seed=seed) for seed in (1, 2))
    added: jax.Array | RelativeBias | None = None
    if isinstance(bias, str):
        added = RelativeBias(draw(32, heads, seed=3), bias == "distances", 20)
    elif bias is not None:
        added = draw(*bias, length, keys, seed=3)
    return Call(q, k, v, Mask(), 0.3, added, crosses=keys != length)


def plain(call: Call) -> jax.Array:
    return attend(call.q, call.k, call.v, call.mask.dense(*call.lengths), lambda weights: weights, call.scale, call.dense_bias())


def attending(call: Call) -> np.ndarray:
    """Returns [B,L]: the queries that attend to a key, and whose place is no padding."""
    seen = call.mask.dense(*call.lengths)
    found = np.ones((2, 1), bool) if seen is None else np.asarray(seen.any((1, 3)))
    found = np.broadcast_to(found, call.q.shape[:2])
    return found if call.crosses or call.mask.keys is None else found & np.asarray(call.mask.keys)


def inputs(call: Call) -> dict[str, jax.Array]:
    """Returns the arrays of a call that have a gradient; of a bias of distances, its table."""
    bias = call.bias.table if isinstance(call.bias, RelativeBias) else call.bias
    return {"q": call.q, "k": call.k, "v": call.v} | ({} if bias is None else {"bias": bias})


def values_and_gradients(function: Callable[[Call], jax.Array], call: Call, real: jax.Array) -> tuple[jax.Array, Any]:
    """Returns the result, and the gradients of the sum of sin(result + 0.5) over real queries."""

    def loss(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        given: dict[str, Any] = dict(arrays)
        if isinstance(call.bias, RelativeBias):
            given["bias"] = call.bias.replace(table=arrays["bias"])
        out = function(dataclasses.replace(call, **given))
        return jnp.sum(jnp.where(real, jnp.sin(out + 0.5), 0)), out

    (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs(call))
    assert np.isfinite(out).all() and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    return out, gradient


def exact(call: Call, real: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the result and the gradients in float64, and the size of each number: what it adds, without signs, where a
    term whose factors have rounding errors counts as often as it feels them. Rounding to fp32 changes a number by
    about 2^-24 of its size."""
    q, k, v = (np.asarray(x, np.float64) for x in (call.q, call.k, call.v))
    each = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, each, 2), np.repeat(v, each, 2)
    dense, seen = call.dense_bias(), call.mask.dense(*call.lengths)
    bias = np.zeros(()) if dense is None else np.asarray(dense, np.float64)
    allowed = np.ones((), bool) if seen is None else np.asarray(seen)

    def products(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.einsum("BHLS,BSHK->BLHK", weights, x)

    def all_gradients(by_scores: np.ndarray, weights: np.ndarray, q: Any, k: Any, given: np.ndarray) -> dict[str, np.ndarray]:
        by_k, by_v = (np.einsum("BHLS,BLHK->BSHK", one, x) for one, x in ((by_scores, q), (weights, given)))
        shared = {name: x.reshape(*x.shape[:2], -1, each, x.shape[3]).sum(3) for name, x in (("k", by_k), ("v", by_v))}
        found = {"q": call.scale * products(by_scores, k), "k": call.scale * shared["k"], "v": shared["v"]}
        if isinstance(call.bias, RelativeBias):
            table = np.zeros(call.bias.table.shape)
            places = np.asarray(call.bias.replace(table=jnp.arange(len(table))[:, None]).dense(*call.lengths))[0, 0]
            np.add.at(table, places, by_scores.sum(0).transpose(1, 2, 0))
            found["bias"] = table
        elif dense is not None:
            found["bias"] = by_scores.sum(tuple(axis for axis in (0, 1) if dense.shape[axis] == 1), keepdims=True)
        return found

    scores = np.where(allowed, call.scale * np.einsum("BLHK,BSHK->BHLS", q, k) + bias, -np.inf)
    weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e9))
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-99)
    out = products(weights, v)
    given = np.cos(out + 0.5) * real[:, :, None, None]
    by_weights, own = np.einsum("BLHK,BSHK->BHLS", given, v), (given * out).sum(-1).swapaxes(1, 2)[..., None]
    values = {"out": out} | all_gradients(weights * (by_weights - own), weights, q, k, given)

    q, k, v = abs(q), abs(k), abs(v)
    felt = call.scale * np.einsum("BLHK,BSHK->BHLS", q, k) + abs(bias)
    weights = weights * (1 + felt + (weights * felt).sum(-1, keepdims=True))
    out = products(weights, v)
    given = (1 + out) * real[:, :, None, None]
    by_weights, own = np.einsum("BLHK,BSHK->BHLS", given, v), (given * out).sum(-1).swapaxes(1, 2)[..., None]
    return values, {"out": out} | all_gradients(weights * (by_weights + own), weights, q, k, given)


def roundings(kernel: Callable[[Call], jax.Array], call: Call, wrong: Call | None = None) -> float:
    """Returns the largest error of a kernel's values and gradients, in fp32 roundings of the sums that they are."""
    real = attending(call)
    right, sizes = exact(call, real)
    out, own = values_and_gradients(kernel, wrong or call, jnp.asarray(real)[:, :, None, None])
    found = {"out": np.where(real[:, :, None, None], out, right["out"])} | own
    errors = [abs(np.asarray(found[name], np.float64) - right[name]) / (sizes[name] + 1e-30) for name in right]
    return max(float(error.max()) for error in errors) * 2**24


def differs(kernel: Callable[[Call], jax.Array], call: Call, wrong: Call | None = None) -> float:
    """Returns the largest difference of a kernel's values and gradients, of `wrong` if given, from the plain path's."""
    real = jnp.asarray(attending(call))[:, :, None, None]

    def both(function: Any, call: Call) -> Any:
        return values_and_gradients(function, call, real)

    (expected, right), (found, own) = both(plain, call), both(kernel, wrong or call)
    apart = [np.where(real, found - expected, 0)] + [own[name] - right[name] for name in own]
    return float(max(np.abs(one).max() for one in apart)) if set(own) == set(right) else float("inf")


KEYS = jnp.asarray(np.array([[1] * 4 + [0] * 3, [0] * 2 + [1] * 5], bool))
NOTHING = jnp.asarray(np.array([[1] * 7, [0] * 7], bool))  # a row that is all padding
PACKED = jnp.asarray(np.array([[1, 1, 1, 2, 2, 0, 0], [1] * 7]))
SEGMENTS = {"query_segments": PACKED, "key_segments": PACKED}
CASES = {
    "all": {},
    "causal": {"causal": True},
    "keys": {"keys": KEYS},
    "a row of padding": {"keys": NOTHING, "causal": True},
    "packed": SEGMENTS,
    "packed, causal, keys, shared heads": {**SEGMENTS, "keys": KEYS, "causal": True, "heads": 4, "groups": 2},
    "window": {"window": 3, "causal": True, "keys": KEYS},
    "window on both sides": {"window": 2},
    "memory": {"keys": KEYS, "length": 3},
    "a bias of all rows": {"bias": (1, 2), "keys": KEYS},
    "a bias of all heads": {"bias": (2, 1), "causal": True, "heads": 4, "groups": 2},
    "distances": {"bias": "distances", "keys": KEYS, "length": 19},
    "distances, packed, causal": {**SEGMENTS, "bias": "distances, one way", "causal": True, "heads": 4, "groups": 2},
    "distances, several blocks": {"bias": "distances, one way", "causal": True, "length": 10, "count": 10},
}


def case(name: str) -> Call:
    sizes = {key: value for key, value in CASES[name].items() if key in ("length", "heads", "groups", "bias")}
    mask = {key: value for key, value in CASES[name].items() if key not in (*sizes, "count")}
    call = made(**{"length": 7, "keys": CASES[name].get("count", 7)} | sizes)
    return dataclasses.replace(call, mask=Mask(**mask))


MIXED = "packed, causal, keys, shared heads"
QUICK = [
    *[("chunked", MIXED), ("chunked", "window"), ("chunked", "memory"), ("chunked", "a bias of all rows")],
    *[("chunked", "distances"), ("relative", "distances"), ("relative", "distances, packed, causal"), ("relative", "memory")],
    *[("splash", MIXED), ("splash", "window on both sides"), ("splash", "a row of padding")],
    *[("flash", "a bias of all heads"), ("pallas_gpu", MIXED)],
]
EVERY = [(kernel, name) for kernel in KERNELS for name in CASES]


@pytest.mark.parametrize(
    ("kernel", "name"), [pytest.param(*one, marks=[] if one in QUICK else pytest.mark.full) for one in EVERY]
)
def test_a_kernel_is_the_plain_path(kernel, name):
    call = case(name)
    if REFUSALS[kernel](call):
        assert kernel != "chunked"
        pytest.skip("refused")
    assert differs(KERNELS[kernel], call) <= TOLERANCE


@st.composite
def calls(draws: Any) -> Call:
    length = draws(st.integers(1, 300))
    crosses, packed = draws(st.booleans()), draws(st.booleans())
    keys = draws(st.integers(1, 300)) if crosses else length
    groups = draws(st.sampled_from([1, 2]))
    causal = not crosses and draws(st.booleans())
    window = draws(st.sampled_from([0, 0, 1, 2, 17, 200])) if causal else 0
    bias = draws(st.sampled_from([None, (1, 2), (2, 2), (1, 1), "distances", "distances, one way"]))
    seed = draws(st.integers(0, 99))
    random = np.random.default_rng(seed)
    mask: dict[str, Any] = {"causal": causal, "window": window}
    if packed:
        segments = np.sort(random.integers(0, 3, (2, max(length, keys))))
        mask |= {"query_segments": jnp.asarray(segments[:, :length]), "key_segments": jnp.asarray(segments[:, :keys])}
    if draws(st.booleans()):
        mask["keys"] = jnp.asarray(random.random((2, keys)) < draws(st.sampled_from([0.0, 0.5, 0.95])))
    call = made(length, keys, 2, groups, bias)
    return dataclasses.replace(call, mask=Mask(**mask))


@pytest.mark.full
@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=40, deadline=None)
@given(call=calls())
@example(call=made(19, 1))  # one key: all queries have the same rounding errors, which add up
def test_any_call_is_the_plain_path(kernel, call):
    if not REFUSALS[kernel](call):
        assert roundings(KERNELS[kernel], call) <= ROUNDINGS


def mutations(call: Call) -> dict[str, Call]:
    """Returns what a wrong kernel would compute."""
    mask = call.mask
    wrong = {
        "segments ignored": mask.replace(query_segments=None, key_segments=None),
        "keys ignored": mask.replace(keys=None),
        "window off by one": mask.replace(window=mask.window + 1),
        "window dropped": mask.replace(window=0),
        "not causal": mask.replace(causal=False),
    }
    found = {name: dataclasses.replace(call, mask=other) for name, other in wrong.items()}
    found |= {"bias dropped": dataclasses.replace(call, bias=jax.tree.map(lambda x: 0 * x, call.bias))}
    if isinstance(call.bias, RelativeBias):
        length, keys = call.lengths
        apart = jnp.arange(keys)[None] - jnp.arange(length)[:, None] - 1
        line = call.bias.numbers(jnp.arange(1 - length, keys) - 1).T
        found["distances off by one"] = dataclasses.replace(call, bias=call.bias.replace(apart=apart, distances=line))
    return found


ALL = ("chunked", "splash")
CAUGHT = [
    ("packed", "segments ignored", ALL),
    ("keys", "keys ignored", ALL),
    ("window", "window off by one", ALL),
    ("window", "window dropped", ALL),
    ("causal", "not causal", ALL),
    ("a bias of all rows", "bias dropped", ("chunked", "flash")),
    ("distances, packed, causal", "bias dropped", ("relative",)),
    ("distances, packed, causal", "distances off by one", ("chunked", "relative")),
    ("distances, packed, causal", "segments ignored", ("relative",)),
]


@pytest.mark.parametrize(("name", "mutation", "kernels"), CAUGHT)
def test_mutations_are_caught(name, mutation, kernels):
    call = case(name)
    for kernel in kernels:
        assert differs(KERNELS[kernel], call, mutations(call)[mutation]) > 1e-3


def test_roundings_are_few_where_gradients_cancel_and_catch_a_mutation():
    """With one key, the gradients of queries and keys are sums that are 0: only their terms say what rounding may do."""
    call = dataclasses.replace(made(19, 1), bias=RelativeBias(draw(32, 2, seed=3)))
    assert roundings(plain, call) <= ROUNDINGS
    call = case("distances")
    assert roundings(plain, call, mutations(call)["distances off by one"]) > 1000 * ROUNDINGS


def test_padding_never_influences_what_is_real():
    call = case("packed, causal, keys, shared heads")
    padding = ~call.mask.keys[:, :, None, None]
    other = dataclasses.replace(call, **{name: jnp.where(padding, 9.0, getattr(call, name)) for name in ("q", "k", "v")})
    real = attending(call)
    for name in ("chunked", "splash"):
        np.testing.assert_array_equal(KERNELS[name](call)[real], KERNELS[name](other)[real])


@pytest.mark.full
def test_blocks_of_distances_that_do_not_fit_are_made_again(monkeypatch):
    from fmjax.layers.kernels import relative_kernel

    monkeypatch.setattr(relative_kernel, "KEPT", 0)
    for name in ("distances", "distances, several blocks"):
        assert differs(relative.attend, case(name)) <= TOLERANCE


def test_a_mesh_divides_rows_and_the_table_of_distances():
    call = case("distances, packed, causal")
    real = jnp.ones((2, 7, 1, 1), bool)
    expected = values_and_gradients(relative.attend, call, real)
    with Layout(make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4]), RULES["fsdp_tp"]).active():
        found = values_and_gradients(relative.attend, call, real)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


@pytest.mark.parametrize("kernel", ["splash", "flash"])
def test_a_mesh_divides_rows_and_heads(kernel):
    call = case("a bias of all rows" if kernel == "flash" else "packed, causal, keys, shared heads")
    mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
    expected = KERNELS[kernel](call)
    with Layout(mesh, RULES["fsdp_tp"]).active():
        lowered = jax.jit(lambda q: KERNELS[kernel](dataclasses.replace(call, q=q))).lower(call.q)
        found = lowered.compile()(call.q)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert "manual_computation" in lowered.as_text() or "shard_map" in lowered.as_text()


def test_chunks_keep_no_scores():
    """The gradient's memory grows with the length, and not with its square."""

    def temporaries(attention: Callable[[Call], jax.Array], length: int) -> int:
        def loss(q: jax.Array) -> jax.Array:
            call = Call(q, q, q, Mask(causal=True), 0.3)
            return attention(call).sum()

        shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(shape).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(chunked.attend, 800) < temporaries(plain, 800) / 8
    assert temporaries(chunked.attend, 800) < 3 * temporaries(chunked.attend, 400)
