"""Which kernel computes each attention of a training step."""

from __future__ import annotations

import jax

from fmjax.contracts import Config, PyTree, Task
from fmjax.distributed.layout import Layout
from fmjax.layers.kernels.call import lowered_for
from fmjax.layers.kernels.choice import AUTO, PLAIN, Choice, preferences, recorded
from fmjax.randomness import dropout_key
from fmjax.train.budget import scanned
from fmjax.train.chunks import for_loss, part_of_batch
from fmjax.train.state import BatchSpec


def attention_kernels(
    model: PyTree, task: Task, params: PyTree, spec: BatchSpec, layout: Layout, config: Config
) -> list[Choice]:
    """Returns the kernel of each attention; none where all are computed by xla, as on a CPU unless
    the config says otherwise.

    Raises UserError if the kernel that is set cannot compute one of them.
    """
    platform, setting = layout.platform, config["model"].get("attention", AUTO)
    with lowered_for(platform, length_parts=layout.length_parts):
        if setting == PLAIN or (setting == AUTO and not preferences()):
            return []
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    generator = config["train"].get("dropout_rng", "threefry2x32")
    key = jax.eval_shape(lambda: dropout_key(0, generator))
    apply = scanned(for_loss(model, task)).apply
    with layout.active(), lowered_for(platform, shapes_only=True), recorded() as found:
        jax.eval_shape(
            lambda params, batch, key: apply({"params": params}, batch, rngs={"dropout": key}),
            shapes,
            part_of_batch(spec, config),
            key,
        )
    return found


def described(choices: list[Choice]) -> str:
    """Returns the kernels in one line, each with the attentions that it computes where there are
    several, and why `auto` chose xla."""
    names = {choice.kernel: choice.reason for choice in choices} or {PLAIN: ""}
    parts = []
    for name, reason in names.items():
        where = [choice.where for choice in choices if choice.kernel == name]
        listed = f" for {', '.join(where)}" if len(names) > 1 else ""
        parts.append(f"{name}{listed}" + (f" ({reason})" if reason else ""))
    return ", ".join(parts)
