"""Attention whose keys travel over the devices that divide the length is that of one device."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from fmjax.distributed.layout import Layout
from fmjax.distributed.sharding import RULES, make_mesh
from fmjax.layers.kernels import chunked, ring
from fmjax.layers.kernels.call import Call
from fmjax.layers.kernels.plain import attend
from fmjax.layers.mask import Mask

TOLERANCE, WIDTH, ROWS = 2e-6, 16, 2
RULE = RULES["fsdp_context"] | {"act_heads": "tensor"}


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", 3)


def layout(parts: int, **others: int) -> Layout:
    axes = {**others, "context": parts}
    return Layout(make_mesh(axes, jax.devices()[: int(np.prod([*axes.values()]))]), RULE)


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def made(length: int, memory: int = 0, heads: int = 2, groups: int = 2, **mask: Any) -> Call:
    k, v = (draw(ROWS, memory or length, groups, WIDTH, seed=seed) for seed in (1, 2))
    return Call(draw(ROWS, length, heads, WIDTH), k, v, Mask(**mask), 0.3, crosses=memory > 0)


def plain(call: Call) -> jax.Array:
    return attend(call.q, call.k, call.v, call.mask.dense(*call.lengths), lambda weights: weights, call.scale)


def both(function: Any, call: Call, real: jax.Array) -> list[jax.Array]:
    """Returns the values where queries attend to a key, and the gradients."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out = jnp.where(real, function(dataclasses.replace(call, q=q, k=k, v=v)), 0)
        return jnp.sum(jnp.sin(out + 0.5) * real), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(call.q, call.k, call.v)
    return [out, *gradients]


def differs(call: Call, where: Layout, wrong: Call | None = None) -> float:
    """Returns the largest difference of values and gradients, of `wrong` if given, from the plain path's."""
    seen = call.mask.dense(*call.lengths)
    real = jnp.ones((1, 1), bool) if seen is None else seen.any((1, 3))
    real = jnp.broadcast_to(real, call.q.shape[:2])[:, :, None, None]
    expected = both(plain, call, real)
    with where.active():
        assert not ring.refusal(call)
        found = both(ring.attend, wrong or call, real)
    assert all(np.isfinite(one).all() for one in found)
    return float(max(np.abs(one - other).max() for one, other in zip(found, expected, strict=True)))


def segments(length: int, seed: int = 0) -> dict[str, jax.Array]:
    ids = jnp.asarray(np.sort(np.random.default_rng(seed).integers(0, 3, (ROWS, length))))
    return {"query_segments": ids, "key_segments": ids}


def first(*counts: int, length: int) -> jax.Array:
    return jnp.arange(length)[None] < jnp.array(counts)[:, None]


SHIFTED = jnp.arange(12)[None] - jnp.array([0, 3])[:, None]
# Lengths per device: 7 is two pieces of 4 and 3, each in blocks of 3.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "all": (4, {"length": 12}),
    "causal": (4, {"length": 8, "causal": True}),
    "causal, three devices": (3, {"length": 12, "causal": True}),
    "packed, causal, keys, shared heads": (
        2,
        {"length": 14, "causal": True, "heads": 4, **segments(14), "keys": first(14, 9, length=14)},
    ),
    "a row of padding": (2, {"length": 8, "causal": True, "keys": first(8, 0, length=8)}),
    "one key mask": (2, {"length": 8, "keys": first(6, length=8)}),
    "window within a device": (4, {"length": 16, "causal": True, "window": 3}),
    "window over a part": (4, {"length": 16, "causal": True, "window": 6}),
    "window over three parts": (4, {"length": 16, "causal": True, "window": 10, **segments(16)}),
    "window of one": (2, {"length": 8, "causal": True, "window": 1}),
    "window on both sides": (4, {"length": 12, "window": 5}),
    "window of positions": (
        4,
        {"length": 12, "causal": True, "window": 3, "query_positions": SHIFTED, "key_positions": SHIFTED},
    ),
    "memory": (2, {"length": 6, "memory": 14, "keys": first(14, 4, length=14)}),
    "queries further on": (2, {"length": 6, "memory": 14, "causal": True, "place": 8}),
}  # fmt: skip
QUICK = ("packed, causal, keys, shared heads", "window over a part", "memory")


def case(name: str) -> tuple[Call, Layout]:
    parts, given = CASES[name]
    return made(**given), layout(parts)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.full) for name in CASES])
def test_the_ring_is_the_plain_path(name):
    assert differs(*case(name)) <= TOLERANCE


@st.composite
def calls(draws: Any) -> tuple[Call, int]:
    parts = draws(st.sampled_from([2, 3, 4]))
    length, crosses = parts * draws(st.integers(1, 20)), draws(st.booleans())
    keys = parts * draws(st.integers(1, 20)) if crosses else length
    mask: dict[str, Any] = {"causal": not crosses and draws(st.booleans())}
    mask["window"] = 0 if crosses else draws(st.sampled_from([0, 0, 1, 2, 7, 30]))
    random = np.random.default_rng(draws(st.integers(0, 99)))
    if draws(st.booleans()):
        ids = np.sort(random.integers(0, 3, (ROWS, max(length, keys))))
        mask |= {"query_segments": jnp.asarray(ids[:, :length]), "key_segments": jnp.asarray(ids[:, :keys])}
    if draws(st.booleans()):
        mask["keys"] = jnp.asarray(random.random((ROWS, keys)) < draws(st.sampled_from([0.0, 0.5, 0.95])))
    heads = draws(st.sampled_from([2, 4]))
    return made(length, keys if crosses else 0, heads, 2, **mask), parts


@pytest.mark.full
@settings(max_examples=60, deadline=None)
@given(drawn=calls())
def test_any_call_is_the_plain_path(drawn):
    call, parts = drawn
    assert differs(call, layout(parts)) <= TOLERANCE * max(1, max(call.lengths) ** 0.5)


@pytest.mark.full
@pytest.mark.parametrize("name", ["packed, causal, keys, shared heads", "window over a part"])
def test_a_mesh_divides_rows_heads_and_length(name):
    call, _ = case(name)
    assert differs(call, layout(2, data=2, tensor=2)) <= TOLERANCE


@pytest.mark.full
def test_two_axes_may_divide_the_length():
    mesh = make_mesh({"data": 2, "context": 2, "fsdp": 2})
    where = Layout(mesh, {"act_batch": "data", "act_length": ("context", "fsdp")})
    assert differs(made(length=12, causal=True), where) <= TOLERANCE


MUTATIONS = {
    "segments ignored": ("packed, causal, keys, shared heads", {"query_segments": None, "key_segments": None}),
    "keys ignored": ("memory", {"keys": None}),
    "a window off by one": ("window over a part", {"window": 7}),
}


@pytest.mark.parametrize("mutation", ["a turn skipped", *(pytest.param(name, marks=pytest.mark.full) for name in MUTATIONS)])
def test_mutations_are_caught(mutation, monkeypatch):
    name, changes = MUTATIONS.get(mutation, ("window over a part", {}))
    call, where = case(name)
    if mutation == "a turn skipped":
        of = ring.Ring.of
        monkeypatch.setattr(ring.Ring, "of", lambda call: dataclasses.replace(of(call), turns=of(call).turns - 1))
    wrong = dataclasses.replace(call, mask=call.mask.replace(**changes))
    assert differs(call, where, wrong) > 1e-3


def test_packed_rows_are_single_rows():
    """Texts of 5, 6 and 3 tokens, one per row and all in one, over the ends of devices' parts."""
    whole, ends = made(length=14, causal=True), [0, 5, 11, 14]
    ids = jnp.repeat(jnp.arange(3), jnp.array([5, 6, 3]), total_repeat_length=14)[None]
    packed = dataclasses.replace(whole, mask=Mask(None, ids, ids, causal=True))
    with layout(2).active():
        found = jax.jit(lambda q: ring.attend(dataclasses.replace(packed, q=q)))(whole.q)
    for begin, end in itertools.pairwise(ends):
        arrays = {name: getattr(whole, name)[:, begin:end] for name in ("q", "k", "v")}
        alone = plain(dataclasses.replace(whole, **arrays, mask=Mask(causal=True)))
        np.testing.assert_allclose(found[:, begin:end], alone, atol=TOLERANCE)


def test_the_program_permutes_and_gathers_nothing():
    length, parts = 112, 4
    where = layout(parts, data=2)
    place = NamedSharding(where.mesh, PartitionSpec("data", "context"))
    array = jax.ShapeDtypeStruct((2, length, 2, WIDTH), jnp.float32, sharding=place)
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=place)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        return ring.attend(Call(q, k, v, Mask(None, ids, ids, causal=True), 0.3)).sum()

    with where.active():
        traced = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=(place,) * 3).trace(array, array, array, ids)
        text = traced.lower().compile().as_text()
    assert "collective-permute" in text
    assert not re.findall(r"all-gather|all-to-all|all-reduce", text)
    # Of two lengths or parts of them, an array has at most blocks.
    own = length // parts
    assert not re.findall(rf"\b({length}|{own}|{own // 2}),({length}|{own}|{own // 2})\b", text)


@pytest.mark.parametrize(
    ("parts", "window", "folds", "turns"),
    [(4, 0, True, 4), (4, 1, False, 1), (4, 5, False, 2), (4, 6, True, 4), (8, 13, False, 4), (2, 2, True, 2)],
)
def test_a_causal_mask_is_balanced_and_a_window_ends_early(parts, window, folds, turns):
    with layout(parts).active():
        found = ring.Ring.of(made(length=4 * parts, causal=True, window=window))
    assert (found.folds, found.turns) == (folds, turns)


def test_what_it_cannot_compute():
    call = made(length=8, causal=True)
    assert ring.refusal(call) == "the mesh does not divide the length; set mesh.rules=fsdp_context, or auto"
    with layout(4).active():
        assert ring.refusal(call) == ""
        assert ring.refusal(dataclasses.replace(call, bias=draw(1, 2, 8, 8))) == "it adds no bias; set xla"
        assert ring.refusal(made(length=6)) == "6 queries and 6 keys do not divide over 4 devices; set xla"
