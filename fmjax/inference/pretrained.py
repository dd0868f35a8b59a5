"""A model with its parameters and processors, to apply, predict and generate with, and to save."""

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

from fmjax import pytree
from fmjax.config.json_files import write_json
from fmjax.contracts import Config, Encodes, Generates, HostBatch, Processors, PyTree, Task, Value
from fmjax.data.kinds import lifecycle, text
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.decoding.loop import as_generator
from fmjax.decoding.settings import (
    GENERATION,
    Generation,
    merge,
    special_tokens,
    token_limit,
)
from fmjax.errors import UserError
from fmjax.filesystems.paths import local_path
from fmjax.hub import families, folders
from fmjax.hub.reference import Outputs, Reference, plain_outputs
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

UNLIMITED = 512  # tokens of an example, where neither a run nor a position table sets a limit
FEATURES = {
    "hidden": "last_hidden_state",
    "encoder_hidden": "encoder_last_hidden_state",
    "pooled": "pooler_output",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A model that can be applied, used for predictions, and saved in Hugging Face's layout.

    It is equal to itself alone, and can be copied and pickled.
    """

    config: Config  # the folder's config.json
    family: Family
    model: nn.Module
    # fp32; from a Hugging Face folder: on the host, with those of other heads that it holds
    params: PyTree
    processors: Processors
    task: Task | None = None  # a run's
    step: int = 0  # a run's
    # the folder's settings of text generation
    generation: Mapping[str, PyTree] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        count = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(self.params))
        step = f", step {self.step:,}" if self.task else ""
        heads = ", ".join(self.model.heads) or "none"
        return f"Pretrained({self.family.name}, {count:,} parameters, heads {heads}{step})"

    def __getstate__(self) -> dict[str, PyTree]:
        # Without what is cached: compiled functions, and copies of the parameters on devices.
        return {field.name: self.__dict__[field.name] for field in dataclasses.fields(self)}

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, where there is one."""
        return self.processors.of(text.Processor).tokenizer if "text" in self.processors else None

    @functools.cached_property
    def reference(self) -> Reference | None:
        """The model's counterpart in Hugging Face, None if it has none: of a folder, by its config;
        else its family's.
        """
        if self.task is None and (kind := folders.model_type(self.config)) is not None:
            return families.reference_for(self.config, kind)[1]
        return families.reference(self.family.name)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs that `apply` takes: the reference's, or the model's where there
        is none.
        """
        return self.family.inputs if self.reference is None else self.reference.inputs

    def apply(self, **arrays: PyTree) -> dict[str, jax.Array]:
        """Returns the reference's outputs for the reference's inputs, by its names, and
        `last_hidden_state` always.

        Inputs are integers [B,L], of multiple choice [B,N,L]; `attention_mask` masks keys alone.
        Computed without dropout, in full fp32 where the model's `dtype` is float32. Raises
        UserError for an unknown or misshapen input and ids out of range.
        """
        axes = ("rows", "choices", "tokens") if "choice" in self.model.heads else ("rows", "tokens")
        features = self._features(checked_inputs(arrays, self.inputs, axes))
        names = {**FEATURES, **self._outputs()}
        outputs: dict[PyTree, jax.Array] = {
            names.get(name, name): array for name, array in features.items()
        }
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
        """Returns what the model's task says of each example: a text, a pair of texts, or a record
        of the task's columns.

        Args:
          examples: a list.
          where: says where an example is, for errors.
          first: the number of the first example where these are a part of many: sampled answers
            depend on it.
          seed: of sampling, 0 by default.
          settings: of generation, which override those of the run or the folder: `max_new_tokens`,
            `temperature` (0: the likeliest token each time), `top_k`, `top_p`, `num_beams`, and
            others of `decoding.settings.Generation`.

        Raises UserError if there is no tokenizer or no task for this model, the settings do not
        fit, or the task cannot read an example or answers it with NaN or infinity, which
        `where(index)` names.
        """
        if isinstance(examples, str | Mapping):
            raise UserError(
                "predict takes a list of examples, not a single one; write predict([example])"
            )
        return self.predictor(examples, seed, settings).finite_answers(examples, where, first)

    def predictor(
        self, examples: Iterable[PyTree], seed: int | None, settings: Mapping[str, Value]
    ) -> Predictor:
        """Returns what answers examples like these, with `settings` as `predict` takes them. Raises
        UserError as it does.
        """
        task = self.task or folder_task(
            self.config, self.model, self.processors, self.class_name, examples
        )
        for kind in lifecycle.missing(task.main, self.processors):
            raise UserError(
                f"the model's folder has no {kind.what}, so {kind.reads} cannot be read; add "
                f"{kind.file}, or use .apply"
            )
        positions = token_limit(self.model.settings)
        if task.generation is None:
            for name, value in {**settings, "seed": seed}.items():
                if value is not None:
                    why = "has no effect, as this model generates no text"
                    raise UserError(f"{name} {why}; leave it out")
            own, sized = self.model.heads, task.sized
            buckets = self.config.get("data", {}).get("buckets") or () if self.task else ()
            borders = [border for border in buckets if isinstance(border, int)]
            heads = functools.partial(
                head_outputs, self._features, own, self.processors, sized, positions, borders
            )
            return Predictor(
                task, self.processors, self._longest(), heads, chunk=chunk_of(own, sized)
            )
        special = special_tokens(self.tokenizer, self.model) if self.tokenizer else {}
        chosen = generation_settings((special, task.generation, self.generation), settings, seed)
        model = self._generator
        compute = functools.partial(
            continued,
            self.checked_batch,
            model,
            self._placed,
            chosen,
            seed or 0,
            starts_prompts=self._starts_prompts,
        )
        behind = not isinstance(model, Encodes)  # the prompt, in the same row
        room = functools.partial(chosen.limits, positions=positions) if behind else None
        return Predictor(task, self.processors, self._longest(), compute, room)

    @overload
    def generate(self, prompts: str, *, seed: int | None = None, **settings: Value) -> str: ...

    @overload
    def generate(
        self, prompts: list[str] | tuple[str, ...], *, seed: int | None = None, **settings: Value
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        *,
        seed: int | None = None,
        return_scores: Literal[False] = False,
        **arrays_and_settings: Value,
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
        """Returns the text that follows a prompt, a list of such for a list of prompts; or, for
        arrays, token ids.

        `generate("Once upon a time", max_new_tokens=40, temperature=0.8)` takes settings as
        `predict` does.

        Arrays: int32 [rows * num_return_sequences, length], prompts with their continuations, as
        long as the longest. Takes the reference's inputs and settings of generation, which override
        the folder's. A decoder-only model reads `input_ids`, `attention_mask` [B,P]; an
        encoder-decoder what its encoder reads and, if given, a prompt per row, `decoder_input_ids`,
        `decoder_attention_mask` [B,P]. Padding of a prompt may stand anywhere; in a decoder-only
        model's it needs no mask if `pad_token_id` is given and ends no row. `seed` is that of
        sampling: row i's draws depend on seed and i alone. With `return_scores`, each sequence
        comes with its log-probability. Raises UserError for inputs as `apply` does, and for
        settings that are not supported.
        """
        given = dict(arrays_and_settings)
        model = self._generator
        names = input_names(model)
        if prompts is not None:
            check_prompts(prompts, [name for name in names if name in given], return_scores)
            several = [prompts] if isinstance(prompts, str) else list(prompts)
            answers = self.predict(several, "prompt {}".format, seed=seed, **given)
            texts = [str(answer["text"]) for answer in answers]
            return texts[0] if isinstance(prompts, str) else texts
        inputs = checked_inputs({name: given.pop(name) for name in names if name in given}, names)
        settings = self._generation(given)
        call = functools.partial(
            generated, self.checked_batch, model, self._placed, inputs, settings, seed or 0
        )
        sequences, log_probs, scores = call(
            return_scores=return_scores, starts_prompts=self._starts_prompts
        )
        if log_probs is None or scores is None:
            return sequences
        return Generated(sequences, log_probs, scores)

    def save(self, folder: str | Path) -> None:
        """Writes a folder that the reference loads, with its processors.

        Raises UserError if the model has no counterpart in Hugging Face, and as
        `folders.write_folder` does.
        """
        reference, config = self.exported()
        wanted = pytree.names(abstract_params(self.model))
        params = {name: leaf for name, leaf in pytree.names(self.params).items() if name in wanted}
        config = {name: value for name, value in config.items() if name != "torch_dtype"}

        def save_beside(folder: Path) -> None:
            generation = self.generation
            if self.task is not None:
                generation = written_generation(self.task, self.model, self.tokenizer)
            if generation:
                write_json(folder / GENERATION, dict(generation), indent=2, sort_keys=True)
            lifecycle.save(folder, self.processors)
            if self.task is not None and self.tokenizer is not None:
                save_prompts(folder, self.task, self.tokenizer)

        folders.write_folder(
            local_path(folder),
            reference,
            config | {"dtype": "float32"},
            pytree.unnames(params),
            save_beside,
        )

    def exported(self) -> tuple[Reference, Config]:
        """Returns the counterpart in Hugging Face and the config there. Raises UserError if there
        is none.
        """
        reference = self.counterpart()
        if self.task is None:
            return reference, dict(self.config)
        return written_config(reference, self.model, self.task, self.tokenizer, self.config)

    def counterpart(self) -> Reference:
        """Returns the counterpart in Hugging Face. Raises UserError if there is none."""
        if self.reference is None:
            raise UserError(
                f'model.name="{self.family.name}" has no Hugging Face counterpart, so it cannot be '
                "exported; keep it as a run"
            )
        return self.reference

    def class_name(self) -> str:
        """Returns the reference's name of the model's class, for messages."""
        if self.task or self.reference is None:
            return "the model"
        return self.reference.architecture(self.config)

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
            raise UserError(
                f"{self.class_name()} has no language-model head, so it generates nothing; load a "
                "model that has one"
            )
        return as_generator(self.model)

    def _generation(self, given: Mapping[str, Value]) -> Generation:
        """Returns the settings of generation of the folder or the run's task, and those given."""
        if self.task is None:
            return merge(self.generation, given)
        special = special_tokens(self.tokenizer, self.model) if self.tokenizer else {}
        return merge(special, self.generation, self.task.generation or {}, given)

    def _longest(self) -> int:
        """Returns how many tokens an example may have: as in training, or as many as there are
        positions.
        """
        positions = token_limit(self.model.settings)
        lengths = [self.config["data"]["max_length"]] if self.task else [positions or UNLIMITED]
        return min(lengths + [positions] * (positions > 0))

    def _outputs(self) -> Outputs:
        """Returns the reference's name of each head's output."""
        heads = self.model.heads
        return plain_outputs(heads) if self.reference is None else self.reference.outputs(heads)

    def _features(self, batch: HostBatch) -> dict[str, jax.Array]:
        """Returns the model's features and heads' outputs for the inputs that `apply` takes and
        whatever else heads read.
        """
        known = {*self.inputs, *self.family.inputs}
        read = {name: array for name, array in batch.items() if name in known or not known}
        features: dict[str, jax.Array] = self._forward({**batch, **self.checked_batch(read)})
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


def abstract_params(model: nn.Module) -> PyTree:
    """Returns the shapes of a model's parameters, with no array made."""
    variables = jax.eval_shape(model.init, jax.random.key(0), model.one_row_batch())
    return nn.meta.unbox(variables["params"])
