"""Which logits a training step computes in chunks, and the memory that they take."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax

from fmjax import pytree
from fmjax.contracts import Config, PyTree, Task
from fmjax.distributed.layout import Layout, accumulation
from fmjax.layers.kernels.call import lowered_for
from fmjax.layers.vocabulary import VocabularyLogits, devices_along
from fmjax.models.sizes import with_chunks
from fmjax.train.state import BatchSpec
from fmjax.train.wrappers import MixtureModel


def for_loss(model: PyTree, task: Task, rows: Mapping[str, PyTree] | None = None) -> PyTree:
    """Returns the model for a task's loss: heads over a vocabulary compute logits in chunks if that
    saves memory.

    `rows` are the rows of a chunk by kind of head, in a mixture by part and kind; by default,
    `model.loss_chunk` decides.
    """
    if isinstance(model, MixtureModel):
        parts = {
            part: for_loss(model.parts[part], own, None if rows is None else rows.get(part, {}))
            for part, own in task.tasks.items()
        }
        return MixtureModel(model.model, parts)
    return with_chunks(model, task.chunked if rows is None else rows, rows)


def part_of_batch(spec: BatchSpec, config: Config) -> BatchSpec:
    """Returns the shapes of what goes through the model at once: a batch, or a part of it."""
    parts = accumulation(config)
    return {
        name: jax.ShapeDtypeStruct((array.shape[0] // parts, *array.shape[1:]), array.dtype)
        for name, array in spec.items()
    }


def chunked_logits(
    model: PyTree, task: Task, params: PyTree, spec: BatchSpec, layout: Layout, config: Config
) -> dict[str, VocabularyLogits]:
    """Returns the logits that a step computes in chunks, abstract, by kind of head, in a mixture
    with the part's name before it."""
    reads, batch = for_loss(model, task), part_of_batch(spec, config)
    if reads is model:
        return {}
    with layout.active(), lowered_for(layout.platform, shapes_only=True):
        outputs = jax.eval_shape(
            lambda params, batch: reads.apply({"params": params}, batch, rngs={}), params, batch
        )
    leaves = jax.tree_util.tree_leaves_with_path(
        outputs, is_leaf=lambda leaf: isinstance(leaf, VocabularyLogits)
    )
    return {
        pytree.path_name(path): leaf for path, leaf in leaves if isinstance(leaf, VocabularyLogits)
    }


def logits_bytes(logits: VocabularyLogits, layout: Layout) -> tuple[int, int]:
    """Returns the bytes per device of the logits of a chunk, and of all."""
    with layout.active():
        own = math.prod(logits.shape) // math.prod(
            map(devices_along, (*logits.axes, "vocab"), logits.shape)
        )
        columns = logits.shape[-1] // devices_along("vocab", logits.shape[-1])
    return 4 * logits.rows * columns, 4 * own
