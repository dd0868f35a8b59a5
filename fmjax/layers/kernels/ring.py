"""Attention over a length that the mesh divides: each device keeps its queries, and keys and values
travel from device to device in a ring (Liu et al. 2023, arXiv:2310.01889).

A device computes in blocks, as `chunked.py` does, and its softmax runs over the keys that come by.
The backward pass sends keys and values around again, and their gradients, in fp32, with them.

Under a causal mask the last device would have the most work in every turn. Therefore each device
exchanges its part of the length: device i of n computes with pieces i and 2n-1-i of 2n, as Llama 3
does (arXiv:2407.21783), which is two of four pairs of pieces in every turn. A window that reaches
back less than half of the length needs no exchange: it ends the turns early instead.

What a device sends per layer, in arrays of the size of its keys: forward 2(n-1), backward 2n and
another 2n in fp32. The exchange of pieces adds 2R + 2 in each direction.

Letters as in `linear.py`; on one device L queries and S keys, in P pieces of l and s; G key heads,
R query heads of each; N blocks of q queries.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from fmjax.layers.kernels import chunked
from fmjax.layers.kernels.call import Call, length_axes, length_parts, over_mesh, to_save
from fmjax.layers.kernels.chunked import Arrays, Blocks, Running, folded, folded_back, no_gradient
from fmjax.layers.kernels.plain import heads_first
from fmjax.layers.mask import MASKED, Mask

RING_AXES: dict[str, tuple[str | None, ...]] = {
    "q": ("act_batch", "act_heads", "act_length", None),
    "k": ("act_batch", "act_heads", "act_length", None),
    "v": ("act_batch", "act_heads", "act_length", None),
    "query_segments": ("act_batch", "act_length"),
    "key_segments": ("act_batch", "act_length"),
    "query_positions": ("act_batch", "act_length"),
    "key_positions": ("act_batch", "act_length"),
    "place": (),
}
Number: TypeAlias = jax.Array | int


def refusal(call: Call) -> str:
    """Returns why it cannot compute a call, "" if it can."""
    if (parts := length_parts()) == 1:
        return "the mesh does not divide the length; set mesh.rules=fsdp_context, or auto"
    if call.bias is not None:
        return "it adds no bias; set xla"
    if any(length % parts for length in call.lengths):
        queries, keys = call.lengths
        return f"{queries} queries and {keys} keys do not divide over {parts} devices; set xla"
    return ""


class Travels(NamedTuple):
    """What is sent from device to device; its leaves begin with P."""

    k: jax.Array  # [P,B,G,s,K]
    v: jax.Array  # [P,B,G,s,K]
    segments: jax.Array | None  # [P,B,s]
    positions: jax.Array | None  # [P,B,s]


class Stays(NamedTuple):
    """What a device keeps of the mask, besides `place`; its leaves begin with P."""

    segments: jax.Array | None  # [P,B,l]
    positions: jax.Array | None  # [P,B,l]
    place: jax.Array  # []


@dataclasses.dataclass(frozen=True)
class Ring:
    """How the length is divided."""

    axes: tuple[str, ...]  # of the mesh
    parts: int  # devices
    turns: int  # how many parts of the keys a query meets
    folds: bool  # a device has the pieces i and 2n-1-i, rather than its own part as one
    queries: int  # of a device
    keys: int  # of a device
    query: int  # queries of a block
    key: int  # keys of a block
    causal: bool
    window: int
    skips: bool  # blocks that places rule out

    @classmethod
    def of(cls, call: Call) -> Ring:
        """Returns the division of a call over the mesh in force."""
        mask, parts = call.mask, length_parts()
        queries, keys = (length // parts for length in call.lengths)
        aligned = queries == keys and isinstance(mask.place, int) and mask.place == 0
        by_place = mask.key_positions is None
        turns = parts
        if aligned and by_place and mask.causal and mask.window:
            turns = min(parts, 1 + -(-(mask.window - 1) // keys))
        # A turn on pieces takes half of the time that one on whole parts takes.
        folds = aligned and mask.causal and 2 * turns > parts
        pieces = 1 + folds
        return cls(
            axes=length_axes(),
            parts=parts,
            turns=parts if folds else turns,
            folds=folds,
            queries=queries,
            keys=keys,
            query=min(chunked.BLOCK, -(-queries // pieces)),
            key=min(chunked.BLOCK, -(-keys // pieces)),
            causal=mask.causal,
            window=mask.window,
            skips=mask.causal or (bool(mask.window) and by_place),
        )

    @property
    def pieces(self) -> int:
        """The number of pieces of a device."""
        return 1 + self.folds

    @property
    def pairs(self) -> tuple[jax.Array, jax.Array]:
        """The pieces of queries and of keys that a turn pairs, one after the other.

        Keys of a second piece follow all queries of first ones.
        """
        return (jnp.array([0, 1, 1]), jnp.array([0, 0, 1])) if self.folds else (jnp.array([0]),) * 2

    @property
    def fills(self) -> bool:
        """Whether pieces of keys are filled up."""
        return bool(self.keys % self.pieces or -(-self.keys // self.pieces) % self.key)

    def start(self, device: jax.Array, piece: Number, length: int) -> jax.Array:
        """Returns the number of the first token of a device's piece, for parts of a length."""
        if not self.folds:
            return device * length
        number = jnp.where(piece == 1, 2 * self.parts - 1 - device, device)
        return number // 2 * length + number % 2 * -(-length // 2)

    def cut(self, x: jax.Array, axis: int, block: int, fill: int = 0) -> jax.Array:
        """Returns the pieces of a device's part, stacked, along an axis: each filled up to whole
        blocks."""

        def filled(x: jax.Array, multiple: int, axis: int) -> jax.Array:
            widths = [(0, -x.shape[axis] % multiple if one == axis else 0) for one in range(x.ndim)]
            return jnp.pad(x, widths, constant_values=fill)

        x = filled(x, self.pieces, axis)
        shape = (*x.shape[:axis], self.pieces, -1, *x.shape[axis + 1 :])
        x = filled(jnp.moveaxis(x.reshape(shape), axis, 0), block, axis + 1)
        return self.exchanged(x) if self.folds else x

    def joined(self, x: jax.Array, axis: int) -> jax.Array:
        """Returns a device's part from its pieces of queries: the inverse of `cut`."""
        x = self.exchanged(x, back=True) if self.folds else x
        size = -(-self.queries // self.pieces)
        x = jnp.moveaxis(jax.lax.slice_in_dim(x, 0, size, axis=axis + 1), 0, axis)
        x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, self.queries, axis=axis)

    def exchanged(self, x: jax.Array, back: bool = False) -> jax.Array:
        """Returns the pieces i and 2n-1-i [2,...] of each device i in place of its own, 2i and
        2i+1; or vice versa."""

        def home(piece: int) -> int:
            return min(piece, 2 * self.parts - 1 - piece)

        def send(x: jax.Array, odd: int) -> jax.Array:
            ways = [(device, home(2 * device + odd)) for device in range(self.parts)]
            ways = [(to, of) for of, to in ways] if back else ways
            sent: jax.Array = jax.lax.ppermute(x, self.axes, ways)
            return sent

        # Pieces of even numbers go by one way and odd ones by another; each device gets one of
        # each, of which the first is as odd as its own number.
        odd = jax.lax.axis_index(self.axes) % 2 == 1
        if back:
            even, uneven = jnp.where(odd, x[1], x[0]), jnp.where(odd, x[0], x[1])
            return jnp.stack([send(even, 0), send(uneven, 1)])
        even, uneven = send(x[0], 0), send(x[1], 1)
        return jnp.stack([jnp.where(odd, uneven, even), jnp.where(odd, even, uneven)])

    def passed(self, tree: Any, by: int = 1) -> Any:
        """Returns what the device that many places before this one has."""
        ways = [(device, (device + by) % self.parts) for device in range(self.parts)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes, ways), tree)

    def pair(
        self, q: jax.Array, keys: Travels, stays: Stays, turn: Number, own: Number, other: Number
    ) -> tuple[Arrays, Blocks]:
        """Returns the inputs of a pair of pieces in a turn, and their blocks."""
        device = jax.lax.axis_index(self.axes)
        source = (device - turn) % self.parts
        mask = Mask(
            query_segments=piece(stays.segments, own),
            key_segments=piece(keys.segments, other),
            query_positions=piece(stays.positions, own),
            key_positions=piece(keys.positions, other),
            place=stays.place
            + self.start(device, own, self.queries)
            - self.start(source, other, self.keys),
            causal=self.causal,
            window=self.window,
        )
        k, v = piece((keys.k, keys.v), other)
        arrays = Arrays(piece(q, own), k, v, None)
        return arrays, Blocks(mask, self.query, self.key, self.skips)


def piece(tree: Any, number: Number) -> Any:
    """Returns one of the pieces that arrays begin with."""
    return jax.tree.map(lambda x: x[number], tree)


def with_piece(tree: Any, number: Number, new: Any) -> Any:
    """Returns arrays of pieces with another piece in place of one."""
    return jax.tree.map(lambda x, one: x.at[number].set(one), tree, new)


def attend(call: Call) -> jax.Array:
    """Returns [B,L,H,K]; 0 for a query that attends to no key."""
    ring, mask, (length, keys) = Ring.of(call), call.mask, call.lengths
    rows = call.q.shape[0]
    query, key = mask.segments(rows, length, keys)
    if query is None and ring.fills:
        query, key = jnp.zeros((rows, length), jnp.int32), jnp.zeros((rows, keys), jnp.int32)
    arrays = {
        "q": heads_first(call.q * call.scale),
        "k": heads_first(call.k),
        "v": heads_first(call.v),
        "query_segments": query,
        "key_segments": key,
        "query_positions": mask.query_positions,
        "key_positions": mask.key_positions,
        "place": jnp.asarray(mask.place, jnp.int32),
    }
    given = {name: array for name, array in arrays.items() if array is not None}
    return heads_first(over_mesh(partial(local, ring), given, RING_AXES))


def local(ring: Ring, arrays: dict[str, jax.Array]) -> jax.Array:
    """Returns a device's [B,H,L,K] from its parts of the arrays."""
    rows, heads, length, width = arrays["q"].shape
    groups = arrays["k"].shape[1]
    q = arrays["q"].reshape(rows, groups, heads // groups, length, width)

    def own(name: str, block: int, fill: int = 0) -> jax.Array | None:
        return ring.cut(arrays[name], 1, block, fill) if name in arrays else None

    keys = Travels(
        ring.cut(arrays["k"], 2, ring.key),
        ring.cut(arrays["v"], 2, ring.key),
        own("key_segments", ring.key, MASKED),
        own("key_positions", ring.key),
    )
    stays = Stays(
        own("query_segments", ring.query), own("query_positions", ring.query), arrays["place"]
    )
    out = attention(ring, ring.cut(q, 3, ring.query), keys, stays)
    return ring.joined(out, 3).reshape(rows, heads, length, width)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(ring: Ring, q: jax.Array, keys: Travels, stays: Stays) -> jax.Array:
    """Returns softmax(q k^T) v of a device's queries [P,B,G,R,l,K] and all devices' keys."""
    return forward(ring, q, keys, stays)[0]


def in_blocks(x: jax.Array, size: int) -> jax.Array:
    """Returns [P,N,B,G,R,q,...] from [P,B,G,R,l,...]."""
    return jnp.moveaxis(x.reshape(*x.shape[:4], -1, size, *x.shape[5:]), 4, 1)


def from_blocks(x: jax.Array) -> jax.Array:
    """Returns [P,B,G,R,l,...] from [P,N,B,G,R,q,...]."""
    return jax.vmap(partial(chunked.joined, axis=3))(x)


def forward(ring: Ring, q: jax.Array, keys: Travels, stays: Stays) -> tuple[jax.Array, jax.Array]:
    """Returns [P,B,G,R,l,K], and the log-sum-exp of each query's scores, fp32 [P,B,G,R,l]."""
    pieces, *lead, length, width = q.shape
    numbers = jnp.arange(length // ring.query)

    def meet(keys: Travels, turn: Number, found: Running) -> Running:
        def pair(found: Running, which: tuple[jax.Array, jax.Array]) -> tuple[Running, None]:
            arrays, blocks = ring.pair(q, keys, stays, turn, *which)

            def queries(_: None, block: tuple[jax.Array, Running]) -> tuple[None, Running]:
                number, running = block
                return None, folded(arrays, blocks, number * ring.query, running)

            _, own = jax.lax.scan(queries, None, (numbers, piece(found, which[0])))
            return with_piece(found, which[0], own), None

        return jax.lax.scan(pair, found, ring.pairs)[0]

    def step(turn: jax.Array, carry: tuple[Travels, Running]) -> tuple[Travels, Running]:
        keys, found = carry
        # Sent before it is computed with, so that both can go on at once.
        after = ring.passed(keys)
        return after, meet(keys, turn, found)

    begin = Running.start((pieces, numbers.size, *lead, ring.query), width)
    keys, found = jax.lax.fori_loop(0, ring.turns - 1, step, (keys, begin))
    out, summed = meet(keys, ring.turns - 1, found).finished(keys.v.dtype)
    return from_blocks(out), from_blocks(summed)


Kept: TypeAlias = tuple[jax.Array, Travels, Stays, jax.Array, jax.Array]


def saved(ring: Ring, q: jax.Array, keys: Travels, stays: Stays) -> tuple[jax.Array, Kept]:
    """Returns the result, and what its gradient needs."""
    out, summed = to_save(*forward(ring, q, keys, stays))
    return out, (q, keys, stays, out, summed)


# The gradients of k and v, in fp32 [P,B,G,s,K], and of q, in fp32 [P,N,B,G,R,q,K].
Gradients: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]


def gradient(ring: Ring, kept: Kept, given: jax.Array) -> tuple[jax.Array, Travels, Stays]:
    """Returns the gradients of queries, keys and values."""
    q, keys, stays, out, summed = kept
    own = jnp.sum(given.astype(jnp.float32) * out.astype(jnp.float32), -1)
    parts = [in_blocks(x, ring.query) for x in (q, given, summed, own)]
    numbers = jnp.arange(parts[0].shape[1])
    zeros = partial(jnp.zeros, dtype=jnp.float32)

    def meet(keys: Travels, turn: Number, of_q: jax.Array) -> Gradients:
        def pair(found: Gradients, which: tuple[jax.Array, jax.Array]) -> tuple[Gradients, None]:
            (of_k, of_v, of_q), (mine, other) = found, which
            arrays, blocks = ring.pair(q, keys, stays, turn, mine, other)

            def queries(sums: chunked.Sums, block: Any) -> tuple[chunked.Sums, jax.Array]:
                number, part, query = block
                return folded_back(arrays, blocks, part, number * ring.query, (sums, query))

            sums = (*piece((of_k, of_v), other), None)
            (k, v, _), query = jax.lax.scan(queries, sums, (numbers, *piece((parts, of_q), mine)))
            return (*with_piece((of_k, of_v), other, (k, v)), with_piece(of_q, mine, query)), None

        begin = (zeros(keys.k.shape), zeros(keys.v.shape), of_q)
        return jax.lax.scan(pair, begin, ring.pairs)[0]

    def step(turn: jax.Array, carry: tuple[Travels, Gradients]) -> tuple[Travels, Gradients]:
        keys, (*sums, of_q) = carry
        after, sums = ring.passed(keys), ring.passed(sums)
        of_k, of_v, of_q = meet(keys, turn, of_q)
        return after, (sums[0] + of_k, sums[1] + of_v, of_q)

    first = meet(keys, 0, zeros(parts[0].shape))
    _, (*sums, of_q) = jax.lax.fori_loop(1, ring.turns, step, (ring.passed(keys), first))
    of_k, of_v = ring.passed(sums, by=1 - ring.turns)  # home
    no_segments, no_positions = jax.tree.map(no_gradient, (keys.segments, keys.positions))
    return (
        from_blocks(of_q).astype(q.dtype),
        Travels(of_k.astype(keys.k.dtype), of_v.astype(keys.v.dtype), no_segments, no_positions),
        jax.tree.map(no_gradient, stays),
    )


attention.defvjp(saved, gradient)
