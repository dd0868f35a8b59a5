"""A model with its parameters and processors, from a Hugging Face folder or a run directory: `load(path)`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmjax import contracts, models, pytree, tasks
from fmjax.config import is_run, read_config
from fmjax.config.json_files import read_json, write_json
from fmjax.contracts import Config, Encodes, Generates, HostBatch, Processors, PyTree, Task, Value
from fmjax.data.kinds import image, lifecycle, preprocessor_config, text
from fmjax.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from fmjax.decoding.loop import as_generator
from fmjax.decoding.settings import GENERATION, Generation, from_config, merge, special_tokens
from fmjax.distributed.hosts import say
from fmjax.errors import UserError
from fmjax.hardware import explained
from fmjax.hub import families, folders, llama2c
from fmjax.hub.reference import CLASSED, Outputs, Reference, class_names, plain_outputs
from fmjax.inference.generation import Generated, generated, input_names
from fmjax.models import Family
from fmjax.models.inputs import checked_inputs
from fmjax.runs.checkpoint import Best, CheckpointReader
from fmjax.runs.folder import CHECKPOINTS

TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
UNLIMITED = 512  # tokens of an example, where neither a run nor a position table sets a limit
CHUNK = 32  # examples predicted at once
FEATURES = {"hidden": "last_hidden_state", "encoder_hidden": "encoder_last_hidden_state", "pooled": "pooler_output"}
KINDS = {"single_label_classification": "single", "multi_label_classification": "multi", "regression": "regression"}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model that can be applied, used for predictions, and saved in Hugging Face's layout."""

    config: Config  # the folder's config.json
    family: Family
    model: nn.Module
    params: PyTree  # fp32; from a Hugging Face folder: on the host, with those of other heads that it holds
    processors: Processors
    task: Task | None = None  # a run's
    step: int = 0  # a run's
    generation: Mapping[str, PyTree] = dataclasses.field(default_factory=dict)  # the folder's settings of text generation

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, where there is one."""
        return self.processors.of(text.Processor).tokenizer if "text" in self.processors else None

    @functools.cached_property
    def reference(self) -> Reference | None:
        """The model's counterpart in Hugging Face, None if it has none: of a folder, by its config; else its family's."""
        if self.task is None and (kind := folders.model_type(self.config)) is not None:
            return families.reference_of(kind)[1]
        return families.reference(self.family.name)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs that `apply` takes: the reference's, or the model's where there is none."""
        return self.family.inputs if self.reference is None else self.reference.inputs

    def apply(self, **arrays: PyTree) -> dict[str, jax.Array]:
        """Returns the reference's outputs for the reference's inputs, by its names, and `last_hidden_state` always.

        Inputs are integers [B,L], of multiple choice [B,N,L]; `attention_mask` masks keys alone. Computed without dropout,
        in full fp32 where the model's `dtype` is float32. Raises UserError for an unknown or misshapen input and ids out of
        range.
        """
        axes = ("rows", "choices", "tokens") if "choice" in self.model.heads else ("rows", "tokens")
        features = self._features(checked_inputs(arrays, self.inputs, axes))
        names = {**FEATURES, **self._outputs()}
        outputs: dict[PyTree, jax.Array] = {names.get(name, name): array for name, array in features.items()}
        for several in [name for name in outputs if isinstance(name, tuple)]:
            outputs |= zip(several, jnp.unstack(outputs.pop(several), axis=-1), strict=True)
        return outputs

    def predict(
        self, examples: Sequence[PyTree], where: Callable[[int], str] = "example {}".format, first: int = 0
    ) -> list[dict[str, PyTree]]:
        """Returns what the model's task says of each example: a text, a pair of texts, or a record of the task's columns.

        `first` is the number of the first example where these are a part of many: sampled answers depend on it.
        Raises UserError if there is no tokenizer or no task for this model, or the task cannot read an example, which
        `where(index)` names.
        """
        if isinstance(examples, str | Mapping):
            raise UserError("predict takes a list of examples, not a single one; write predict([example])")
        task = self.task or reference_task(self, examples)
        for kind in lifecycle.missing(task.main, self.processors):
            raise UserError(
                f"the model's folder has no {kind.what}, so {kind.reads} cannot be read; add {kind.file}, or use .apply"
            )
        most = self._longest()
        described: list[dict[str, PyTree]] = []
        for begin in range(0, len(examples), CHUNK):
            chunk = examples[begin : begin + CHUNK]
            named = [where(index) for index in range(begin, begin + len(chunk))]
            batch = task.inputs(chunk, self.processors, most, named.__getitem__)
            described += task.describe(self._answers(task, batch, first + begin), batch, self.processors)
        return described

    @overload
    def generate(
        self, *, seed: int = 0, return_scores: Literal[False] = False, **arrays_and_settings: Value
    ) -> np.ndarray: ...

    @overload
    def generate(self, *, seed: int = 0, return_scores: Literal[True], **arrays_and_settings: Value) -> Generated: ...

    def generate(
        self, *, seed: int = 0, return_scores: bool = False, **arrays_and_settings: Value
    ) -> np.ndarray | Generated:
        """Returns prompts with their continuations: int32 [rows * num_return_sequences, length], as long as the longest.

        Takes the reference's inputs and settings of generation, which override the folder's. A decoder-only model reads
        `input_ids`, `attention_mask` [B,P]; an encoder-decoder what its encoder reads and, if given, a prompt per row,
        `decoder_input_ids`, `decoder_attention_mask` [B,P]. Padding of a prompt may stand anywhere; in a decoder-only model's
        it needs no mask if `pad_token_id` is given and ends no row. `seed` is that of sampling: row i's draws depend on seed
        and i alone. With `return_scores`, each sequence comes with its log-probability. Raises UserError for inputs as
        `apply` does, and for settings not handled.
        """
        given = dict(arrays_and_settings)
        model = self._generator
        names = input_names(model)
        inputs = checked_inputs({name: given.pop(name) for name in names if name in given}, names)
        settings = self._generation(given)
        sequences, log_probs, scores = generated(
            self.checked_batch, model, self._placed, inputs, settings, seed, return_scores=return_scores
        )
        if log_probs is None or scores is None:
            return sequences
        return Generated(sequences, log_probs, scores)

    def save(self, folder: str | Path) -> None:
        """Writes a folder that the reference loads, with its processors.

        Raises UserError if the model has no counterpart in Hugging Face, and as `folders.write_folder` does.
        """
        reference, config = self.counterpart(), dict(self.config)
        if self.task is not None:
            reference, config = reference_config(self)
        wanted = pytree.names(abstract_params(self.model))
        params = {name: leaf for name, leaf in pytree.names(self.params).items() if name in wanted}
        config.pop("torch_dtype", None)
        folders.write_folder(folder, reference, config | {"dtype": "float32"}, pytree.unnames(params), self.tokenizer)
        if generation := self._saved_generation():
            write_json(Path(folder).expanduser() / GENERATION, generation, indent=2, sort_keys=True)
        lifecycle.save(Path(folder).expanduser(), self.processors)

    def counterpart(self) -> Reference:
        """Returns the counterpart in Hugging Face. Raises UserError if there is none."""
        if self.reference is None:
            raise UserError(
                f'model.name="{self.family.name}" has no Hugging Face counterpart, so it cannot be exported; keep it as a run'
            )
        return self.reference

    def class_name(self) -> str:
        """Returns the reference's name of the model's class, for messages."""
        return "the model" if self.task or self.reference is None else self.reference.architecture(self.config)

    def checked_batch(self, inputs: HostBatch) -> dict[str, np.ndarray]:
        """Returns the model's batch of the inputs that `apply` takes, as arrays.

        Raises UserError, naming the value, for ids out of range and shapes that do not fit.
        """
        settings = self.model.settings
        arrays = dict(inputs) if self.reference is None else self.reference.batch(inputs, settings)
        return self.family.checked_batch(arrays, settings)

    @property
    def _generator(self) -> Generates:
        """The model. Raises UserError if it has no language-model head."""
        if "lm" not in self.model.heads:
            raise UserError(f"{self.class_name()} has no language-model head, so it generates nothing; load a model that has one")
        return as_generator(self.model)

    def _generation(self, given: Mapping[str, Value]) -> Generation:
        """Returns the settings of generation of the folder or the run's task, and those given."""
        special = {} if self.tokenizer is None or self.task is None else special_tokens(self.tokenizer, self.model)
        own = (self.task.generation if self.task else None) or {}
        return merge(special, self.generation, own, given)

    def _saved_generation(self) -> dict[str, PyTree]:
        """Returns the reference's settings of generation: the folder's, or those of a run that generates."""
        if self.task is None or self.task.generation is None:
            return dict(self.generation)
        special = special_tokens(self.tokenizer, self.model) if self.tokenizer else {}
        return special | {name: value for name, value in self.task.generation.items() if value is not None}

    def _longest(self) -> int:
        """Returns how many tokens an example may have: as in training, or as many as there are positions."""
        positions = position_count(self.model.settings)
        lengths = [self.config["data"]["max_length"]] if self.task else [positions or UNLIMITED]
        return min(lengths + [positions] * (positions > 0))

    def _answers(self, task: Task, batch: Mapping[str, PyTree], first: int) -> dict[str, np.ndarray]:
        """Returns what a task describes: what the model generates, if its predicting is that, or each head's output.

        `first` is the number of the batch's first example.
        """
        if task.generation is None:
            return self._heads(batch, task.sized)
        special = special_tokens(self.tokenizer, self.model) if self.tokenizer else {}
        settings = merge(special, task.generation, self.generation)
        model = self._generator
        inputs = {name: batch[name] for name in input_names(model) if name in batch}
        sequences, _, _ = generated(self.checked_batch, model, self._placed, inputs, settings, first_row=first)
        return {"generated": sequences}

    def _heads(self, batch: Mapping[str, PyTree], sized: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns each head's output for a task's batch, without what stays on the host; `sized` arrays may be padded."""
        arrays = {name: array for name, array in batch.items() if not name.startswith("_")}
        for processor in self.processors.values():
            arrays = processor.pad(arrays, sized, position_count(self.model.settings))
        # An example may have many rows, as a question about a long text has.
        count = len(next(iter(arrays.values())))
        parts = []
        for begin in range(0, count, CHUNK):
            rows = np.minimum(np.arange(begin, begin + min(count, CHUNK)), count - 1)
            outputs = self._features({name: array[rows] for name, array in arrays.items()})
            parts.append(jax.device_get({kind: outputs[kind] for kind in self.model.heads}))
        return {kind: np.concatenate([part[kind] for part in parts])[:count] for kind in self.model.heads}

    def _outputs(self) -> Outputs:
        """Returns the reference's name of each head's output."""
        heads = self.model.heads
        return plain_outputs(heads) if self.reference is None else self.reference.outputs(heads)

    def _features(self, batch: HostBatch) -> dict[str, jax.Array]:
        """Returns the model's features and heads' outputs for the inputs that `apply` takes and whatever else heads read."""
        known = {*self.inputs, *self.family.inputs}
        checked = self.checked_batch({name: array for name, array in batch.items() if name in known or not known})
        features: dict[str, jax.Array] = self._forward({**batch, **checked})
        return features

    @functools.cached_property
    def _forward(self) -> PyTree:
        def forward(params: PyTree, batch: Mapping[str, jax.Array]) -> PyTree:
            # GPUs and TPUs would multiply fp32 matrices with fewer digits.
            with jax.default_matmul_precision("float32"):
                return self.model.apply({"params": params}, batch)

        return functools.partial(jax.jit(forward), self._placed)

    @functools.cached_property
    def _placed(self) -> PyTree:
        """The parameters on the device."""
        return jax.device_put(self.params)


def load(path: str | Path) -> Pretrained:
    """Returns the model of a Hugging Face folder, of a run directory at its best step (the latest, if none is best), or of a
    checkpoint of llama2.c, a file that ends in .bin.

    Raises UserError if it is none of these, is not whole, or holds a model that is not handled.
    """
    path = Path(path).expanduser()
    if path.is_file() and path.suffix == ".bin":
        return load_llama2c(path)
    if path.is_file():
        raise UserError(f"{path}: is a file; give the folder that it stands in, or a .bin of llama2.c")
    with explained():
        return load_run(path) if is_run(path) else load_reference(path)


def load_llama2c(path: Path) -> Pretrained:
    """Returns the model of a checkpoint of llama2.c."""
    config, tensors, tokenizer = llama2c.read(path)
    family, reference = models.family("llama"), families.table_of("llama")
    model = family.build(heads=reference.heads(config), **reference.read_settings(config))
    loaded = folders.fit_weights(path, tensors, reference, abstract_params(model))
    processors = Processors(*([text.Processor(tokenizer)] if tokenizer else []))
    return Pretrained(config, family, model, loaded.params, processors, generation=from_config(config))


def load_reference(folder: Path) -> Pretrained:
    """Returns the model of a Hugging Face folder; `architectures` in its config says which."""
    config = folders.read_config(folder)
    name, reference = families.reference_of(folders.model_type(config) or "")
    family = models.family(name)
    model = family.build(heads=reference.heads(config), **reference.read_settings(config))
    loaded = folders.read_weights(folder, reference, abstract_params(model))
    if loaded.fresh:
        lost = f"{reference.architecture(config)} lacks its {', '.join(loaded.fresh)}"
        raise UserError(f"{folder}: {lost}; get the whole weights, or correct architectures in config.json")
    if loaded.unused:
        say(f"warning: {folder}: not used: {', '.join(loaded.unused)}")
    params = pytree.unnames(pytree.names(loaded.params) | pytree.names(loaded.others))
    file = folder / GENERATION
    generation = read_json(file) if file.exists() else from_config(config)
    processors = reference_processors(folder, reference.inputs, model.settings)
    return Pretrained(config, family, model, params, processors, generation=generation)


def reference_processors(folder: Path, inputs: Sequence[str], settings: PyTree) -> Processors:
    """Returns the tokenizer of a Hugging Face folder, if it has one, and the image processor of a model that reads images."""
    found: list[contracts.Processor] = []
    if any(any(folder.glob(pattern)) for pattern in TOKENIZERS):
        found.append(text.Processor(load_tokenizer(folder)))
    if "pixel_values" in inputs:
        found.append(image.Processor.of(preprocessor_config.read(folder, settings.image_size, settings.channels)))
    return Processors(*found)


def load_run(folder: Path) -> Pretrained:
    """Returns the model of a run directory: its moving average where it keeps one."""
    config = read_config(folder)
    task = tasks.make(config["task"])
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
    task = task.main  # of a mixture, which was trained with the heads of all its parts
    model = model.clone(heads=task.heads)
    return Pretrained(config, family, model, params, lifecycle.restore(folder, task), task, step)


def position_count(settings: PyTree) -> int:
    """Returns the size of the position table, 0 where rows may be of any length."""
    return int(dataclasses.asdict(settings).get("positions", 0))


def abstract_params(model: nn.Module) -> PyTree:
    """Returns the shapes of a model's parameters, with no array made."""
    return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), model.one_row_batch())["params"])


def reference_task(pretrained: Pretrained, examples: Sequence[PyTree]) -> Task:
    """Returns the task of a Hugging Face folder, by its heads. Raises UserError if it has none."""
    config, kinds = pretrained.config, pretrained.model.heads
    images = pretrained.processors.get("image")
    if isinstance(images, image.Processor) and (head := next((kind for kind in kinds if kind.startswith("classify")), "")):
        labels = class_names(config)
        return tasks.make({"name": "image_classify", "head": head, "labels": labels, **images.settings()})
    if "mlm" in kinds:
        return tasks.make({"name": "mlm", "nsp": "nsp" in kinds})
    if "tag" in kinds:
        return tasks.make({"name": "tag", "labels": class_names(config), "overlong": "split"})
    if "span" in kinds:
        return tasks.make({"name": "qa"})
    if "choice" in kinds:
        return tasks.make({"name": "choice", "overlong": "truncate"})
    if "lm" in kinds:
        if not isinstance(pretrained.model, Encodes):
            return tasks.make({"name": "clm", "rows": "offset"})
        most = min(pretrained.model.settings.positions or 128, 128)
        return tasks.make({"name": "seq2seq", "source": "text", "scores": (), "max_new_tokens": most})
    if "classify" not in kinds:
        advice = "use .apply, or a model for masked words or classes"
        raise UserError(f"{pretrained.class_name()} has no human-readable output; {advice}")
    labels = class_names(config)
    problem = config.get("problem_type") or ("regression" if len(labels) == 1 else "single_label_classification")
    if problem not in KINDS:
        raise UserError(f'config.json: problem_type="{problem}" is not handled; those that are: {", ".join(KINDS)}')
    kind = KINDS[problem]
    if kind == "regression" and len(labels) > 1:
        raise UserError(f"config.json: a regression with {len(labels)} outputs has no human-readable output; use .apply")
    paired = any("text_pair" in example if isinstance(example, Mapping) else not isinstance(example, str) for example in examples)
    return tasks.make({"name": "classify", "kind": kind, "labels": labels, "text_pair": "text_pair" if paired else ""})


def reference_config(pretrained: Pretrained) -> tuple[Reference, Config]:
    """Returns the counterpart of a run and its config there. Raises UserError if the reference has no such model."""
    model, task, tokenizer = pretrained.model, pretrained.task, pretrained.tokenizer
    reference, name = pretrained.counterpart().exported(model.heads)
    pad_id = tokenizer.pad_id if tokenizer and "pad" in tokenizer.roles else None
    config = reference.write_config(model.settings, pad_id) | {"architectures": [name]}
    if task is not None and set(CLASSED) & set(model.heads):
        labels = task.labels or ("LABEL_0",)
        config["id2label"] = {str(index): label for index, label in enumerate(labels)}
        config["label2id"] = {label: index for index, label in enumerate(labels)}
    if task is not None and "classify" in model.heads:
        config["problem_type"] = next(theirs for theirs, ours in KINDS.items() if ours == task.kind)
    return reference, config
