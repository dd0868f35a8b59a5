"""Stacks of layers: scanned or unrolled, with or without rematerialization, identical or in a
repeating pattern. Letters as in `linear.py`.

A pattern has one or more blocks and one or more contexts: layer i has block i mod (number of
blocks) and context i mod (number of contexts). Layers that differ only in mask or rotary table have
one block and several contexts.

Parameters are stacked on a first axis, one stack per block: `layers/...` [N, ...] for a single
block, whatever the contexts; else `layers/0/...`, `layers/1/...`, each with the layers of that
block in order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmjax.contracts import PyTree
from fmjax.errors import UserError, nearest
from fmjax.layers.attention import Context
from fmjax.layers.blocks import Caches, ModuleFactory
from fmjax.layers.kernels.call import SAVED
from fmjax.layers.kernels.choice import AUTO, PLAIN
from fmjax.layers.taps import PERTURBATIONS, written_collections

# What a layer stores for its backward pass besides its input (Chen et al. 2016, arXiv:1604.06174):
# everything, the results of products with parameters and of attention, those of attention, nothing.
# JAX's kernels flash, cudnn and pallas_gpu do not name their results, and are computed again.
OF_ATTENTION = jax.checkpoint_policies.save_only_these_names(SAVED)
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, OF_ATTENTION
    ),
    "attention": OF_ATTENTION,
    "everything": jax.checkpoint_policies.nothing_saveable,
}
Taps = Mapping[str, PyTree]


@dataclasses.dataclass(frozen=True)
class Layers:
    """The number of layers, and how they are computed.

    `scan` compiles one body for all repetitions of the pattern; an unrolled loop, the default, runs
    faster but compiles slower. `remat` names a policy in REMAT: values that are not stored are
    recomputed in the backward pass. `attention` names the kernel (`kernels/choice.py`).
    """

    count: int
    scan: bool = False
    remat: str = "none"
    attention: str = AUTO


def stack(
    parent: nn.Module,
    blocks: ModuleFactory | Sequence[ModuleFactory],
    layers: Layers,
    x: jax.Array,
    contexts: Context | Sequence[Context],
    caches: Sequence[Caches] | None = None,
) -> tuple[jax.Array, tuple[Caches, ...] | None]:
    """Runs x through layers whose parameters are `parent`'s parameter `layers`, as described at the
    top of this file.

    The parameters may also be a tuple with those of each layer (`unstack_layers`). Each layer has
    its own initialization key, and its index is folded into the dropout key, so neither the
    parameters nor the loss depend on `layers.scan`; with caches the loop is always unrolled. The
    context has the depth of each layer. The taps of layer i (`taps.py`) are at `layers/<i>`.

    Returns the new x and, if there are `caches`, the new one of each layer. Raises UserError for an
    unknown remat policy.
    """
    if layers.remat not in REMAT:
        hint = nearest(layers.remat, REMAT)
        raise UserError(
            f'model.remat="{layers.remat}": no such policy{hint}; choose one of {", ".join(REMAT)}'
        )
    factories = [blocks] if callable(blocks) else blocks[: layers.count]
    modules = tuple(block(parent=None) for block in factories)
    shared = (contexts,) if isinstance(contexts, Context) else tuple(contexts[: layers.count])
    shared = tuple(own_context(one, parent, layers, x, caches) for one in shared)
    if parent.has_variable("params", "layers"):
        # `param` would run the initializer again to compare shapes, without a memory if a cache has
        # its keys.
        params = nn.meta.unbox(parent.get_variable("params", "layers"))
    else:
        params = parent.param("layers", lambda key: initial(modules, shared, layers.count, x, key))
    perturbations: dict[str, Taps] = parent.get_variable(PERTURBATIONS, "layers", {})
    taps = [perturbations.get(str(index), {}) for index in range(layers.count)]
    key = parent.make_rng("dropout") if parent.has_rng("dropout") else None
    loop = Loop(modules, shared, layers, key, written_collections(parent))
    if layers.scan and caches is None and not isinstance(params, tuple) and alike(taps):
        x, after, values = loop.scanned(x, params, taps)
    else:
        x, after, values = loop.unrolled(x, params, taps, caches)
    for name in loop.written:
        parent.put_variable(
            name, "layers", {str(i): own[name] for i, own in enumerate(values) if name in own}
        )
    return x, None if caches is None else after


def own_context(
    context: Context,
    parent: nn.Module,
    layers: Layers,
    x: jax.Array,
    caches: Sequence[Caches] | None,
) -> Context:
    """Returns the context of a stack's layers: with its kernel, its name, and its masks dense."""
    # Parameters are initialized by the plain path: nobody reads what it computes.
    kernel = PLAIN if parent.is_initializing() else layers.attention
    named = dataclasses.replace(context, kernel=kernel, where="/".join(parent.path))
    if context.mask.empty and context.memory_mask.empty:
        return named
    length, memory = x.shape[1], context.memory
    keys, memory_keys = length, length if memory is None else memory.shape[1]
    if caches:
        keys = caches[0]["attention"]["key"].shape[2]
        if "cross" in caches[0]:
            memory_keys = caches[0]["cross"]["key"].shape[2]
    return named.with_dense_masks(length, keys, memory_keys)


def initial(
    modules: Sequence[nn.Module],
    contexts: Sequence[Context],
    count: int,
    x: jax.Array,
    key: jax.Array,
) -> PyTree:
    """Returns fresh parameters, boxed with the names of their axes, the first of which is
    "layers"."""
    keys = jax.random.split(key, count)
    axis = {nn.PARTITION_NAME: "layers"}

    def initial_stack(place: int) -> PyTree:
        module, context = modules[place], contexts[place % len(contexts)]
        boxed = jax.vmap(lambda one: module.init(one, x, context)["params"])(
            keys[place :: len(modules)]
        )
        return jax.tree.map(
            lambda box: box.add_axis(0, axis),
            boxed,
            is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
        )

    if len(modules) == 1:
        return initial_stack(0)
    return {str(place): initial_stack(place) for place in range(len(modules))}


@dataclasses.dataclass(frozen=True)
class Loop:
    """The layers of one call of `stack`."""

    modules: tuple[nn.Module, ...]
    contexts: tuple[Context, ...]
    layers: Layers
    key: jax.Array | None  # dropout key
    written: tuple[str, ...]  # the requested collections of taps

    @property
    def period(self) -> int:
        """The number of layers after which the pattern repeats."""
        return math.lcm(len(self.modules), len(self.contexts))

    def layer(self, place: int, prevent_cse: bool) -> Callable[..., tuple[jax.Array, Caches, Taps]]:
        """Returns the function of a layer at a position of the pattern, which returns its x, its
        cache and its taps."""
        module, shared = (
            self.modules[place % len(self.modules)],
            self.contexts[place % len(self.contexts)],
        )

        def apply(
            x: jax.Array, index: jax.Array | int, params: PyTree, taps: Taps, cache: Caches | None
        ) -> tuple[jax.Array, Caches, Taps]:
            rngs = {} if self.key is None else {"dropout": jax.random.fold_in(self.key, index)}
            depth = jnp.asarray(index, jnp.float32) / max(self.layers.count - 1, 1)
            context = dataclasses.replace(shared, depth=depth)
            variables = {"params": params} | ({PERTURBATIONS: taps} if taps else {})
            (x, cache), values = module.apply(
                variables, x, context, cache, rngs=rngs, mutable=list(self.written)
            )
            return x, cache or {}, values

        if self.layers.remat == "none":
            return apply
        return jax.checkpoint(apply, policy=REMAT[self.layers.remat], prevent_cse=prevent_cse)

    def unrolled(
        self, x: jax.Array, params: PyTree, taps: Sequence[Taps], caches: Sequence[Caches] | None
    ) -> tuple[jax.Array, tuple[Caches, ...], list[Taps]]:
        """Returns x, and the cache and the taps of each layer."""
        run = [self.layer(place, prevent_cse=True) for place in range(self.period)]
        each = params if isinstance(params, tuple) else split_layers(params)
        after, values = [], []
        for index, (own, given, cache) in enumerate(
            zip(each, taps, caches or (None,) * len(taps), strict=True)
        ):
            x, cache, tapped = run[index % self.period](x, index, own, given, cache)
            after.append(cache)
            values.append(tapped)
        return x, tuple(after), values

    def scanned(
        self, x: jax.Array, params: PyTree, taps: Sequence[Taps]
    ) -> tuple[jax.Array, tuple[Caches, ...], list[Taps]]:
        """Returns x, no caches, and the taps of each layer: a scan over repetitions of the pattern,
        then the remaining layers."""
        period, blocks = self.period, len(self.modules)
        turns = self.layers.count // period
        # Inside a scan, the compiler cannot merge what is recomputed with what was computed first.
        run = [self.layer(place, prevent_cse=False) for place in range(period)]
        stacks = stacks_of(params)
        counted = jnp.arange(turns)
        indices = [counted if period == 1 else counted * period + place for place in range(period)]
        own = [repeated(part, turns, period // blocks) for part in stacks]
        given = [
            stacked([taps[turn * period + place] for turn in range(turns)])
            for place in range(period)
        ]

        def turn(x: jax.Array, one: tuple[Any, Any, Any]) -> tuple[jax.Array, list[Taps]]:
            index, own, given = one
            values = []
            for place, apply in enumerate(run):
                mine = (
                    own[place % blocks]
                    if period == blocks
                    else at(own[place % blocks], place // blocks)
                )
                x, _, tapped = apply(x, index[place], mine, given[place], None)
                values.append(tapped)
            return x, values

        x, by_place = jax.lax.scan(turn, x, (indices, own, given))
        values = (
            [at(by_place[place], number) for number in range(turns) for place in range(period)]
            if self.written
            else []
        )
        for index in range(turns * period, self.layers.count):
            apply = self.layer(index % period, prevent_cse=True)
            x, _, tapped = apply(
                x, index, at(stacks[index % blocks], index // blocks), taps[index], None
            )
            values.append(tapped)
        return x, (), values


def alike(taps: Sequence[Taps]) -> bool:
    """Returns whether all layers have perturbations with the same names."""
    return len({jax.tree.structure(own) for own in taps}) < 2


def at(tree: PyTree, index: int) -> PyTree:
    """Returns a tree with each leaf indexed along its first axis."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def stacked(trees: Sequence[PyTree]) -> PyTree:
    """Returns trees of the same structure, stacked on a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) if trees else {}


def repeated(params: PyTree, turns: int, each: int) -> PyTree:
    """Returns the stack [N, ...] of a block that a pattern has `each` times as [turns, each, ...],
    [turns, ...] if once."""
    if each == 1:
        return jax.tree.map(lambda leaf: leaf if len(leaf) == turns else leaf[:turns], params)
    return jax.tree.map(
        lambda leaf: leaf[: turns * each].reshape(turns, each, *leaf.shape[1:]), params
    )


def stacks_of(params: PyTree) -> list[PyTree]:
    """Returns the stack of each block."""
    return [params[str(place)] for place in range(len(params))] if "0" in params else [params]


def split_layers(params: PyTree) -> tuple[PyTree, ...]:
    """Returns the parameters of each layer, in order, from the stacked parameters."""
    stacks = []
    for part in stacks_of(params):
        leaves, structure = jax.tree.flatten(part)
        stacks.append(
            [
                jax.tree.unflatten(structure, layer)
                for layer in zip(*map(jnp.unstack, leaves), strict=True)
            ]
        )
    count = sum(map(len, stacks))
    return tuple(stacks[index % len(stacks)][index // len(stacks)] for index in range(count))


def unstack_layers(params: PyTree) -> PyTree:
    """Returns a model's parameters with each `layers` as a tuple with the parameters of each layer.
    This is for loops, since each read from a stack copies."""
    if not isinstance(params, Mapping):
        return params
    return {
        name: split_layers(part) if name == "layers" else unstack_layers(part)
        for name, part in params.items()
    }
