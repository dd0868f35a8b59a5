"""A model with its parameters and processors, from a Hugging Face folder or a run directory: `load(path)`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from fmjax.decoding.settings import (
    GENERATION,
    Generation,
    from_config,
    merge,
    special_tokens,
    token_limit,
)
from fmjax.distributed.hosts import say
from fmjax.errors import UserError
from fmjax.hardware import explained
from fmjax.hub import families, folders, llama2c
from fmjax.hub.reference import Outputs, Reference, plain_outputs
from fmjax.hub.tensors import check_finite
from fmjax.inference.answers import check_answers
from fmjax.inference.export import save_prompts, written_config, written_generation
from fmjax.inference.folder_task import folder_task
from fmjax.inference.generation import Generated, continued, generated, input_names
from fmjax.inference.predicting import (
    Predictor,
    check_prompts,
    chunk_of,
    generation_settings,
    head_outputs,
)
from fmjax.models import Family
from fmjax.models.inputs import checked_inputs
from fmjax.runs.best import stored_best
from fmjax.runs.checkpoint import CheckpointReader
from fmjax.runs.folder import CHECKPOINTS, has_failed_start

TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
UNLIMITED = 512  # tokens of an example, where neither a run nor a position table sets a limit
FEATURES = {"hidden": "last_hidden_state", "encoder_hidden": "encoder_last_hidden_state", "pooled": "pooler_output"}


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A model that can be applied, used for predictions, and saved in Hugging Face's layout.

    It is equal to itself alone, and can be copied and pickled.
    """

    config: Config  # the folder's config.json
    family: Family
    model: nn.Module
    params: PyTree  # fp32; from a Hugging Face folder: on the host, with those of other heads that it holds
    processors: Processors
    task: Task | None = None  # a run's
    step: int = 0  # a run's
    generation: Mapping[str, PyTree] = dataclasses.field(default_factory=dict)  # the folder's settings of text generation

    def __repr__(self) -> str:
        count = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(self.params))
        step = f", step {self.step:,}" if self.task else ""
        return f"Pretrained({self.family.name}, {count:,} parameters, heads {', '.join(self.model.heads) or 'none'}{step})"

    def __getstate__(self) -> dict[str, PyTree]:
        # Without what is cached: compiled functions, and copies of the parameters on devices.
        return {field.name: self.__dict__[field.name] for field in dataclasses.fields(self)}

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, where there is one."""
        return self.processors.of(text.Processor).tokenizer if "text" in self.processors else None

    @functools.cached_property
    def reference(self) -> Reference | None:
        """The model's counterpart in Hugging Face, None if it has none: of a folder, by its config; else its family's."""
        if self.task is None and (kind := folders.model_type(self.config)) is not None:
            return families.reference_for(self.config, kind)[1]
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
        self,
        examples: Sequence[PyTree],
        where: Callable[[int], str] = "example {}".format,
        first: int = 0,
        *,
        seed: int | None = None,
        **settings: Value,
    ) -> list[dict[str, PyTree]]:
        """Returns what the model's task says of each example: a text, a pair of texts, or a record of the task's columns.

        Args:
          examples: a list.
          where: says where an example is, for errors.
          first: the number of the first example where these are a part of many: sampled answers depend on it.
          seed: of sampling, 0 by default.
          settings: of generation, which override those of the run or the folder: `max_new_tokens`, `temperature` (0: the
            likeliest token each time), `top_k`, `top_p`, `num_beams`, and others of `decoding.settings.Generation`.

        Raises UserError if there is no tokenizer or no task for this model, the settings do not fit, or the task cannot read
        an example or answers it with NaN or infinity, which `where(index)` names.
        """
        if isinstance(examples, str | Mapping):
            raise UserError("predict takes a list of examples, not a single one; write predict([example])")
        predictor = self.predictor(examples, seed, settings)
        found: list[dict[str, PyTree]] = []
        for begin in range(0, len(examples), predictor.chunk):
            chunk = examples[begin : begin + predictor.chunk]
            named = [where(index) for index in range(begin, begin + len(chunk))]
            answers = predictor.answers(chunk, named.__getitem__, first + begin)
            check_answers(answers, named.__getitem__)
            found += answers
        return found

    def predictor(self, examples: Iterable[PyTree], seed: int | None, settings: Mapping[str, Value]) -> Predictor:
        """Returns what answers examples like these, with `settings` as `predict` takes them. Raises UserError as it does."""
        task = self.task or folder_task(self.config, self.model, self.processors, self.class_name, examples)
        for kind in lifecycle.missing(task.main, self.processors):
            raise UserError(
                f"the model's folder has no {kind.what}, so {kind.reads} cannot be read; add {kind.file}, or use .apply"
            )
        positions = token_limit(self.model.settings)
        if task.generation is None:
            if given := [name for name, value in {**settings, "seed": seed}.items() if value is not None]:
                raise UserError(f"{given[0]} has no effect, as this model generates no text; leave it out")
            own, sized = self.model.heads, task.sized
            buckets = self.config.get("data", {}).get("buckets") or () if self.task else ()
            borders = [border for border in buckets if isinstance(border, int)]
            heads = functools.partial(head_outputs, self._features, own, self.processors, sized, positions, borders)
            return Predictor(task, self.processors, self._longest(), heads, chunk=chunk_of(own, sized))
        special = special_tokens(self.tokenizer, self.model) if self.tokenizer else {}
        chosen = generation_settings((special, task.generation, self.generation), settings, seed)
        model = self._generator
        compute = functools.partial(
            continued, self.checked_batch, model, self._placed, chosen, seed or 0, starts_prompts=self._starts_prompts
        )
        room = None if isinstance(model, Encodes) else functools.partial(chosen.limits, positions=positions)
        return Predictor(task, self.processors, self._longest(), compute, room)

    @overload
    def generate(self, prompts: str, *, seed: int | None = None, **settings: Value) -> str: ...

    @overload
    def generate(self, prompts: list[str] | tuple[str, ...], *, seed: int | None = None, **settings: Value) -> list[str]: ...

    @overload
    def generate(
        self, *, seed: int | None = None, return_scores: Literal[False] = False, **arrays_and_settings: Value
    ) -> np.ndarray: ...

    @overload
    def generate(
        self, *, seed: int | None = None, return_scores: Literal[True], **arrays_and_settings: Value
    ) -> Generated: ...

    def generate(
        self,
        prompts: str | list[str] | tuple[str, ...] | None = None,
        *,
        seed: int | None = None,
        return_scores: bool = False,
        **arrays_and_settings: Value,
    ) -> str | list[str] | np.ndarray | Generated:
        """Returns the text that follows a prompt, a list of such for a list of prompts; or, for arrays, token ids.

        `generate("Once upon a time", max_new_tokens=40, temperature=0.8)` takes settings as `predict` does.

        Arrays: int32 [rows * num_return_sequences, length], prompts with their continuations, as long as the longest.
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
        if prompts is not None:
            check_prompts(prompts, [name for name in names if name in given], return_scores)
            several = [prompts] if isinstance(prompts, str) else list(prompts)
            texts = [str(answer["text"]) for answer in self.predict(several, "prompt {}".format, seed=seed, **given)]
            return texts[0] if isinstance(prompts, str) else texts
        inputs = checked_inputs({name: given.pop(name) for name in names if name in given}, names)
        settings = self._generation(given)
        call = functools.partial(generated, self.checked_batch, model, self._placed, inputs, settings, seed or 0)
        sequences, log_probs, scores = call(return_scores=return_scores, starts_prompts=self._starts_prompts)
        if log_probs is None or scores is None:
            return sequences
        return Generated(sequences, log_probs, scores)

    def save(self, folder: str | Path) -> None:
        """Writes a folder that the reference loads, with its processors.

        Raises UserError if the model has no counterpart in Hugging Face, and as `folders.write_folder` does.
        """
        reference, config = self.exported()
        wanted = pytree.names(abstract_params(self.model))
        params = {name: leaf for name, leaf in pytree.names(self.params).items() if name in wanted}
        config = {name: value for name, value in config.items() if name != "torch_dtype"}

        def save_beside(folder: Path) -> None:
            generation = self.generation if self.task is None else written_generation(self.task, self.model, self.tokenizer)
            if generation:
                write_json(folder / GENERATION, dict(generation), indent=2, sort_keys=True)
            lifecycle.save(folder, self.processors)
            if self.task is not None and self.tokenizer is not None:
                save_prompts(folder, self.task, self.tokenizer)

        folders.write_folder(folder, reference, config | {"dtype": "float32"}, pytree.unnames(params), save_beside)

    def exported(self) -> tuple[Reference, Config]:
        """Returns the counterpart in Hugging Face and the config there. Raises UserError if there is none."""
        reference = self.counterpart()
        if self.task is None:
            return reference, dict(self.config)
        return written_config(reference, self.model, self.task, self.tokenizer, self.config)

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
    def _starts_prompts(self) -> bool:
        """Whether a decoder's prompts get a start token where they have none."""
        return self.reference is None or self.reference.starts_prompts

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

    def _longest(self) -> int:
        """Returns how many tokens an example may have: as in training, or as many as there are positions."""
        positions = token_limit(self.model.settings)
        lengths = [self.config["data"]["max_length"]] if self.task else [positions or UNLIMITED]
        return min(lengths + [positions] * (positions > 0))

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
    if path.is_file() and path.suffix.lower() == ".bin":
        return load_llama2c(path)
    if path.is_file():
        raise UserError(f"{path}: is a file; give the folder that it stands in, or a .bin of llama2.c")
    with explained():
        return load_run(path) if is_run(path) or has_failed_start(path) else load_reference(path)


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
    name, reference = families.reference_for(config, folders.model_type(config) or "")
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
    none = f"{folder}: the run has no checkpoint yet; train it first, with the same --workdir"
    if has_failed_start(folder):
        raise UserError(none)
    config = read_config(folder)
    task = tasks.make(config["task"])
    settings = dict(config["model"])
    if "context" in settings:  # of rotary positions: the rows that it trained on may be longer
        settings["context"] = max(settings["context"], config["data"]["max_length"])
    family = models.family(settings.pop("name"))
    model = family.build(heads=task.heads, **settings)
    checkpoints = CheckpointReader(folder / CHECKPOINTS, best=stored_best(config, task))
    step = checkpoints.best()
    step = checkpoints.latest() if step is None else step
    if step is None:
        raise UserError(none)
    item = "ema" if "ema" in checkpoints.items(step) else "params"
    params = checkpoints.restore(step, {item: abstract_params(model)})[item]
    for name, leaf in pytree.names(params).items():
        check_finite(f"{folder} at step {step}", name, np.asarray(leaf), "take an earlier checkpoint, or train anew")
    task = task.main  # of a mixture, which was trained with the heads of all its parts
    model = model.clone(heads=task.heads)
    return Pretrained(config, family, model, params, lifecycle.restore(folder, task), task, step)


def abstract_params(model: nn.Module) -> PyTree:
    """Returns the shapes of a model's parameters, with no array made."""
    return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), model.one_row_batch())["params"])
