"""Small runs of every family, for tests of what must not change them: layouts, optimizers' sharding, remat, scanning, parts."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmjax.config import apply_overrides, load_config, to_dict
from fmjax.data.stream.batches import TrainBatches, batch_shapes
from fmjax.distributed import sharding
from fmjax.distributed.layout import Layout
from fmjax.train.experiment import prepare
from fmjax.train.initial import create_state
from fmjax.train.stages import describe, training_step
from support import corpus

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STEPS = 10
# Sizes that the axes divide; a large eps: where a gradient is zero but for rounding, Adam would make steps of the rounding.
COMMON = {"optim.eps": "1e-3", "optim.weight_decay": "0.01", "data.batch_size": "8", "model.dropout": "0.1"}
TEXT = COMMON | {"model.vocab_size": "1024"}
NO_DROPOUT = {key: value for key, value in TEXT.items() if key != "model.dropout"}  # Llama has none
FAMILIES: dict[str, tuple[str, dict[str, str]]] = {
    "bert": ("bert_mlm.py:tiny,nsp", TEXT),
    "gpt": ("gpt_clm.py:tiny", TEXT),
    "llama": ("gpt_clm.py:tiny,llama", NO_DROPOUT | {"model.kv_heads": "2"}),
    "t5": ("t5_span.py:tiny", TEXT),
    "transformer": ("transformer_translate.py:tiny", TEXT),
    "bart": ("bart_denoise.py:tiny", TEXT),
    "vit": ("vit_classify.py:tiny", COMMON),
    "mae": ("vit_mae.py:tiny", COMMON),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A family's config, model and task, and the batches it trains on."""

    config: dict[str, Any]
    experiment: Any
    batches: list[dict[str, np.ndarray]]


@functools.cache
def case(family: str, folder: Path) -> Case:
    name, changes = FAMILIES[family]
    loaded = load_config(f"{CONFIGS / name}")
    apply_overrides(loaded, list(changes.items()))
    config = to_dict(loaded)
    with corpus.small():
        experiment = prepare(config, folder / family)
        batches = TrainBatches(experiment.built.examples["train"], batch_size=experiment.batch_size, seed=0)
        return Case(experiment.config, experiment, list(itertools.islice(batches, STEPS)))


def one_device() -> jax.sharding.Mesh:
    return jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])


def losses(
    found: Case,
    mesh: jax.sharding.Mesh,
    rules: sharding.Rules,
    *,
    optimizer_settings: dict[str, Any] | None = None,
    parts: int = 1,
    **changes: Any,
) -> np.ndarray:
    """Returns the losses of the first steps on a mesh; `changes` are of the model's settings."""
    experiment, config = found.experiment, found.config | {"optim": found.config["optim"] | (optimizer_settings or {})}
    built, layout = experiment.built, Layout(mesh, rules)
    model = built.model.clone(settings=dataclasses.replace(built.model.settings, **changes))
    config |= {"train": config["train"] | {"accumulate": parts}}
    abstract = describe(config, model, batch_shapes(config, built.examples["train"]), 100, layout)
    step = jax.jit(training_step(config, model, built.task, abstract), donate_argnums=0)
    shardings = sharding.batch_shardings(abstract.spec, rules, mesh)
    history = []
    with layout.active():
        state = create_state(model, abstract.optimizer.transform, abstract.spec, abstract.state, seed=0)
        for batch in found.batches:
            placed = {name: jax.device_put(batch[name], shardings[name]) for name in abstract.spec}
            state, metrics = step(state, placed, jax.random.key(1))
            history.append(metrics["loss"])
    return np.array(jax.device_get(history))
