"""Evaluation: a model's predictions on every example, gathered on the host, and the task's metrics of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from fmjax.data.pipeline import eval_batches
from fmjax.pretrained import load_run
from fmjax.train.experiment import open_split
from fmjax.train.logs import Bar

Predict = Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]]


def make_predict(model: nn.Module, task: Any) -> Predict:
    """Returns the jitted function (params, batch) -> the task's per-example predictions, without dropout."""

    def predict(params: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return task.predictions(model.apply({"params": params}, batch), batch)

    return jax.jit(predict)


def evaluate(
    predict: Predict,
    task: Any,
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    place: Callable[[dict[str, np.ndarray]], Mapping[str, Any]] = dict,
) -> dict[str, float]:
    """Returns the task's metrics over all examples of the batches, each counted once.

    AUC, F1 and rank correlations are not sums, so predictions are gathered per example; `valid` marks rows that only
    fill up the last batch.
    """
    arrays: list[dict[str, np.ndarray]] = []
    valid: list[np.ndarray] = []
    for batch in batches:
        batch = dict(batch)
        valid.append(batch.pop("valid"))
        arrays.append(jax.device_get(predict(params, place(batch))))
    gathered = {name: np.concatenate([part[name] for part in arrays]) for name in arrays[0]}
    return task.metrics(gathered, np.concatenate(valid))


def evaluate_run(workdir: Path, split: str, files: str | None = None) -> dict[str, Any]:
    """Evaluates a run on a split, or on `files` in its place; returns where and at which step, and the metrics.

    The parameters are those of the best step if the run keeps one, else of the newest, averaged if the run averages them.

    Raises UserError if the run or the data are not there.
    """
    loaded = load_run(workdir)
    config = loaded.config
    data = config["data"] | ({"files": {split: files}} if files else {})
    source = open_split(data, split)
    size = config["data"]["batch_size"]
    examples = loaded.task.examples(source, loaded.tokenizer, data["max_length"], train=False)
    batches = eval_batches(examples, batch_size=size, seed=config["train"]["seed"])
    with Bar(f"evaluate {split}", -(-len(examples) // size)) as bar:
        metrics = evaluate(make_predict(loaded.model, loaded.task), loaded.task, loaded.params, bar.track(batches))
    return {"workdir": str(workdir), "split": split, "examples": len(examples), "step": loaded.step} | metrics
