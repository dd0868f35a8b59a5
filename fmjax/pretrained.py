"""A model with its parameters and tokenizer, from a Hugging Face folder or a run directory: `load(path)`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from fmjax import hub, models, pytree, tasks
from fmjax.config import read_config
from fmjax.data.tokenizers import Tokenizer, load_tokenizer
from fmjax.errors import UserError
from fmjax.models.inputs import checked_inputs
from fmjax.train.checkpoint import Best, CheckpointReader
from fmjax.train.logs import say
from fmjax.train.rundir import CHECKPOINTS, TOKENIZER

TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
CHUNK = 32  # examples predicted at once, and the multiple to which their lengths are filled up
FEATURES = {"hidden": "last_hidden_state", "encoder_hidden": "encoder_last_hidden_state", "pooled": "pooler_output"}
KINDS = {"single_label_classification": "single", "multi_label_classification": "multi", "regression": "regression"}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model that can be applied, used for predictions, and saved in Hugging Face's layout."""

    config: Mapping[str, Any]  # the folder's config.json
    family: ModuleType
    model: nn.Module
    params: Any  # fp32; from a Hugging Face folder: on the host, with those of other heads that it holds
    tokenizer: Tokenizer | None
    task: Any = None  # a run's
    step: int = 0  # a run's

    def apply(self, **arrays: Any) -> dict[str, jax.Array]:
        """Returns the reference's outputs for the reference's inputs, by its names, and `last_hidden_state` always.

        Inputs are integers [B,L]; `attention_mask` masks keys alone. Computed without dropout, in full fp32 where
        the model's `dtype` is float32. Raises UserError for an unknown or misshapen input and ids out of range.
        """
        features = self._features(checked_inputs(arrays, self.family.INPUTS))
        names = FEATURES | self._outputs()
        return {names[name]: array for name, array in features.items()}

    def predict(self, examples: Sequence[Any], where: Callable[[int], str] = "example {}".format) -> list[dict[str, Any]]:
        """Returns what the model's task says of each example: a text, a pair of texts, or a record of the task's columns.

        Raises UserError if there is no tokenizer or no task for this model, or the task cannot read an example, which
        `where(index)` names.
        """
        if self.tokenizer is None:
            raise UserError("the model's folder has no tokenizer, so texts cannot be read; add tokenizer.json, or use .apply")
        if isinstance(examples, str | Mapping):
            raise UserError("predict takes a list of examples, not a single one; write predict([example])")
        task = self.task or reference_task(self, examples)
        positions = self.model.settings.positions
        most = min(self.config["data"]["max_length"], positions) if self.task else positions
        described: list[dict[str, Any]] = []
        for begin in range(0, len(examples), CHUNK):
            chunk = examples[begin : begin + CHUNK]
            named = [where(index) for index in range(begin, begin + len(chunk))]
            batch = task.inputs(chunk, self.tokenizer, most, named.__getitem__)
            outputs = self._features(fill_up(batch, self.tokenizer.pad_id, positions))
            heads = jax.device_get({kind: outputs[kind] for kind in self.model.heads})
            described += task.describe(heads, batch, self.tokenizer)
        return described

    def save(self, folder: str | Path) -> None:
        """Writes a folder that the reference loads, tokenizer included; see `hub.write_folder` for what it refuses."""
        wanted = pytree.names(abstract_params(self.model))
        params = {name: leaf for name, leaf in pytree.names(self.params).items() if name in wanted}
        config = dict(self.config) if self.task is None else reference_config(self)
        config.pop("torch_dtype", None)
        hub.write_folder(folder, self.family, config | {"dtype": "float32"}, pytree.unnames(params), self.tokenizer)

    def _outputs(self) -> dict[str, str]:
        """Returns the reference's name of each head's output."""
        kinds = self.model.heads
        for outputs in self.family.ARCHITECTURES.values():
            if set(outputs) == set(kinds):
                return outputs
        return {kind: "logits" if len(kinds) == 1 else kind for kind in kinds}

    def _features(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Returns the model's features and heads' outputs for the reference's inputs and whatever else heads read."""
        inputs = {name: array for name, array in batch.items() if name in self.family.INPUTS}
        checked = self.family.reference_inputs(inputs, self.model.settings)
        return self._forward({**batch, **checked})

    @functools.cached_property
    def _forward(self) -> Any:
        def forward(params: Any, batch: Mapping[str, jax.Array]) -> Any:
            # GPUs and TPUs would multiply fp32 matrices with fewer digits.
            with jax.default_matmul_precision("float32"):
                return self.model.apply({"params": params}, batch)

        return functools.partial(jax.jit(forward), jax.device_put(self.params))


def load(path: str | Path) -> Pretrained:
    """Returns the model of a Hugging Face folder, or of a run directory at its best step (the latest, if none is best).

    Raises UserError if the folder is neither, is not whole, or holds a model that is not handled.
    """
    return load_run(Path(path)) if hub.is_run(path) else load_reference(Path(path))


def load_reference(folder: Path) -> Pretrained:
    """Returns the model of a Hugging Face folder; `architectures` in its config says which."""
    config = hub.read_config(folder)
    family = models.family_of(config["model_type"])
    model = family.build(heads=hub.heads(family, config), **family.from_reference(config))
    loaded = hub.read_weights(folder, family, abstract_params(model))
    if loaded.fresh:
        lost = f"{hub.architecture(family, config)} lacks its {', '.join(loaded.fresh)}"
        raise UserError(f"{folder}: {lost}; get the whole weights, or correct architectures in config.json")
    if loaded.unused:
        say(f"warning: {folder}: not used: {', '.join(loaded.unused)}")
    params = pytree.unnames(pytree.names(loaded.params) | pytree.names(loaded.others))
    named = any(any(folder.glob(pattern)) for pattern in TOKENIZERS)
    return Pretrained(config, family, model, params, load_tokenizer(folder) if named else None)


def load_run(folder: Path) -> Pretrained:
    """Returns the model of a run directory: its moving average where it keeps one."""
    config = read_config(folder)
    # JSON has no tuples.
    task = tasks.make({key: tuple(value) if isinstance(value, list) else value for key, value in config["task"].items()})
    settings = dict(config["model"])
    family = models.family(settings.pop("name"))
    model = family.build(heads=task.heads, **settings)
    chosen = config["checkpoint"].get("best")
    best = Best(chosen, config["checkpoint"]["mode"]) if chosen else None
    checkpoints = CheckpointReader(folder / CHECKPOINTS, best=best)
    step = checkpoints.best()
    step = checkpoints.latest() if step is None else step
    if step is None:
        raise UserError(f"{folder}: has no checkpoint yet; train it first, with the same --workdir")
    item = "ema" if "ema" in checkpoints.items(step) else "params"
    params = checkpoints.restore(step, {item: abstract_params(model)})[item]
    return Pretrained(config, family, model, params, load_tokenizer(folder / TOKENIZER), task, step)


def abstract_params(model: nn.Module) -> Any:
    """Returns the shapes of a model's parameters, with no array made."""
    return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), model.smallest())["params"])


def fill_up(batch: Mapping[str, np.ndarray], pad_id: int, most: int) -> dict[str, np.ndarray]:
    """Returns a batch whose second axes are multiples of CHUNK, at most `most`, so that few shapes are compiled."""
    filled = {}
    for name, array in batch.items():
        length = array.shape[1]
        more = max(min(-(-length // CHUNK) * CHUNK, most) - length, 0)
        filled[name] = np.pad(array, ((0, 0), (0, more)), constant_values=pad_id if name == "input_ids" else 0)
    return filled


def reference_task(pretrained: Pretrained, examples: Sequence[Any]) -> Any:
    """Returns the task of a Hugging Face folder, by its heads. Raises UserError if it has none."""
    config, kinds = pretrained.config, pretrained.model.heads
    if "mlm" in kinds:
        return tasks.make({"name": "mlm", "nsp": "nsp" in kinds})
    if "classify" not in kinds:
        name = hub.architecture(pretrained.family, config)
        raise UserError(f"{name} predicts nothing that a person could read; use .apply, or a model for masked words or classes")
    labels = hub.class_names(config)
    problem = config.get("problem_type") or ("regression" if len(labels) == 1 else "single_label_classification")
    if problem not in KINDS:
        raise UserError(f'config.json: problem_type="{problem}" is not handled; those that are: {", ".join(KINDS)}')
    kind = KINDS[problem]
    if kind == "regression" and len(labels) > 1:
        raise UserError(f"config.json: a regression with {len(labels)} outputs is nothing that a person could read; use .apply")
    paired = any("text_pair" in example if isinstance(example, Mapping) else not isinstance(example, str) for example in examples)
    return tasks.make({"name": "classify", "kind": kind, "labels": labels, "text_pair": "text_pair" if paired else ""})


def reference_config(pretrained: Pretrained) -> dict[str, Any]:
    """Returns the reference's config for a run. Raises UserError if the reference has no such model."""
    family, model, task = pretrained.family, pretrained.model, pretrained.task
    known = family.ARCHITECTURES
    name = next((name for name in known if set(known[name]) == set(model.heads)), None)
    if name is None:
        raise UserError(f"the reference has no model with the heads {', '.join(model.heads)}; it has {', '.join(known)}")
    config = family.to_reference(model.settings, pretrained.tokenizer.pad_id if pretrained.tokenizer else None)
    config["architectures"] = [name]
    if "classify" in model.heads:
        labels = task.labels or ("LABEL_0",)
        config["id2label"] = {str(index): label for index, label in enumerate(labels)}
        config["label2id"] = {label: index for index, label in enumerate(labels)}
        config["problem_type"] = next(theirs for theirs, ours in KINDS.items() if ours == task.kind)
    return config
