"""Every kernel gives the plain path's values and gradients, wherever a query has a key to attend to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmjax.distributed.layout import Layout
from fmjax.distributed.sharding import RULES, make_mesh
from fmjax.layers.kernels import chunked, gpu, tpu
from fmjax.layers.kernels.call import Call
from fmjax.layers.kernels.plain import attend
from fmjax.layers.mask import Mask

TOLERANCE, WIDTH = 2e-6, 16
KERNELS: dict[str, Callable[[Call], jax.Array]] = {
    "chunked": chunked.attend, "splash": tpu.splash, "flash": tpu.flash, "pallas_gpu": gpu.pallas,
}  # fmt: skip
REFUSALS = {
    "chunked": chunked.refusal, "splash": tpu.splash_refusal, "flash": tpu.flash_refusal, "pallas_gpu": gpu.pallas_refusal,
}  # fmt: skip


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Runs Pallas kernels on the CPU, and divides into blocks what is as short as a test."""
    from jax.experimental import pallas

    call = pallas.pallas_call
    monkeypatch.setattr(pallas, "pallas_call", lambda *args, **options: call(*args, **{**options, "interpret": True}))
    monkeypatch.setattr(chunked, "BLOCK", 5)


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def made(length: int, keys: int = 7, heads: int = 2, groups: int | None = None, bias: tuple[int, int] | None = None) -> Call:
    """Returns a call of 2 rows, without a mask."""
    q, (k, v) = draw(2, length, heads, WIDTH), (draw(2, keys, groups or heads, WIDTH, seed=seed) for seed in (1, 2))
    added = None if bias is None else draw(*bias, length, keys, seed=3)
    return Call(q, k, v, Mask(), 0.3, added, crosses=keys != length)


def plain(call: Call) -> jax.Array:
    return attend(call.q, call.k, call.v, call.mask.dense(*call.lengths), lambda weights: weights, call.scale, call.bias)


def attending(call: Call) -> np.ndarray:
    """Returns [B,L]: the queries that attend to a key, and whose place is no padding."""
    seen = call.mask.dense(*call.lengths)
    found = np.ones((2, 1), bool) if seen is None else np.asarray(seen.any((1, 3)))
    found = np.broadcast_to(found, call.q.shape[:2])
    return found if call.crosses or call.mask.keys is None else found & np.asarray(call.mask.keys)


def differs(kernel: Callable[[Call], jax.Array], call: Call, wrong: Call | None = None) -> float:
    """Returns the largest difference of a kernel's values and gradients, of `wrong` if given, from the plain path's."""
    real = jnp.asarray(attending(call))[:, :, None, None]

    def both(function: Any, call: Call) -> Any:
        arrays = {name: getattr(call, name) for name in ("q", "k", "v", "bias") if getattr(call, name) is not None}

        def loss(arrays: Any) -> Any:
            out = function(dataclasses.replace(call, **arrays))
            return jnp.sum(jnp.where(real, jnp.sin(out + 0.5), 0)), out

        (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        return out, gradient

    (expected, right), (found, own) = both(plain, call), both(kernel, wrong or call)
    assert np.isfinite(found).all() and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(own))
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
}


def case(name: str) -> Call:
    sizes = {key: value for key, value in CASES[name].items() if key in ("length", "heads", "groups", "bias")}
    mask = {key: value for key, value in CASES[name].items() if key not in sizes}
    return dataclasses.replace(made(**{"length": 7} | sizes), mask=Mask(**mask))


MIXED = "packed, causal, keys, shared heads"
QUICK = [
    *[("chunked", MIXED), ("chunked", "window"), ("chunked", "memory"), ("chunked", "a bias of all rows")],
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
    bias = draws(st.sampled_from([None, (1, 2), (2, 2), (1, 1)]))
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
def test_any_call_is_the_plain_path(kernel, call):
    if not REFUSALS[kernel](call):
        assert differs(KERNELS[kernel], call) <= TOLERANCE * max(1, max(call.lengths) ** 0.5)


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
    return found | {"bias dropped": dataclasses.replace(call, bias=call.bias if call.bias is None else 0 * call.bias)}


ALL = ("chunked", "splash")
CAUGHT = [
    ("packed", "segments ignored", ALL),
    ("keys", "keys ignored", ALL),
    ("window", "window off by one", ALL),
    ("window", "window dropped", ALL),
    ("causal", "not causal", ALL),
    ("a bias of all rows", "bias dropped", ("chunked", "flash")),
]


@pytest.mark.parametrize(("name", "mutation", "kernels"), CAUGHT)
def test_mutations_are_caught(name, mutation, kernels):
    call = case(name)
    for kernel in kernels:
        assert differs(KERNELS[kernel], call, mutations(call)[mutation]) > 1e-3


def test_padding_never_influences_what_is_real():
    call = case("packed, causal, keys, shared heads")
    padding = ~call.mask.keys[:, :, None, None]
    other = dataclasses.replace(call, **{name: jnp.where(padding, 9.0, getattr(call, name)) for name in ("q", "k", "v")})
    real = attending(call)
    for name in ("chunked", "splash"):
        np.testing.assert_array_equal(KERNELS[name](call)[real], KERNELS[name](other)[real])


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
