"""Prediction: a task's answers to examples, and generation settings from the user."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np

from fmjax.config.commandline import Flags
from fmjax.contracts import Config, HostBatch, Processors, PyTree, Record, Task, Value, Where
from fmjax.decoding.settings import Generation, merge
from fmjax.errors import UserError
from fmjax.inference.answers import check_answers

CHUNK = 32  # examples predicted at once
WINDOW = 256  # examples read at once; those of similar length are predicted together
PER_TOKEN = ("lm", "mlm")  # heads with large outputs, which are computed one CHUNK at a time
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
FLAGS = ("max_new_tokens", "temperature", "top_k", "top_p", "num_beams")  # of the command line
SEEDS = 2**32  # a random key has 32 bits of a seed


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Answers examples.

    Attributes:
      task: the task, which reads the examples and describes the model's outputs.
      processors: the processors of the model.
      longest: the maximum number of tokens of an example.
      compute: returns the outputs that the task describes; called with the task's batch and the
        index of its first example.
      room: raises UserError for a prompt length that leaves no room for an answer; None if nothing
        is generated after a prompt.
      chunk: the number of examples to pass to `answers` at once.
    """

    task: Task
    processors: Processors
    longest: int
    compute: Callable[[Mapping[str, PyTree], int], dict[str, np.ndarray]]
    room: Callable[[int], object] | None = None
    chunk: int = CHUNK

    def read(self, examples: Sequence[Value], where: Where) -> Mapping[str, PyTree]:
        """Returns the task's batch of examples.

        Raises UserError, naming the example by `where(index)`, for one that cannot be read.
        """
        batch = self.task.inputs(examples, self.processors, self.longest, where)
        if self.room is not None:
            for index, size in enumerate(np.asarray(batch["attention_mask"]).sum(axis=1).tolist()):
                try:
                    self.room(size)
                except UserError as error:
                    raise UserError(f"{where(index)}: {error}") from None
        return batch

    def answers(self, examples: Sequence[Value], where: Where, first: int = 0) -> list[Record]:
        """Returns the answer to each example; `first` is the overall index of the first one.

        Raises UserError like `read`.
        """
        batch = self.read(examples, where)
        return self.task.describe(self.compute(batch, first), batch, self.processors)

    def finite_answers(
        self, examples: Sequence[Value], where: Where, first: int = 0
    ) -> list[Record]:
        """Returns the answers to any number of examples, computed a chunk at a time.

        Raises UserError as `read` does, and for an answer with NaN or infinity.
        """
        found: list[Record] = []
        for begin in range(0, len(examples), self.chunk):
            chunk = examples[begin : begin + self.chunk]
            named = [where(index) for index in range(begin, begin + len(chunk))]
            answers = self.answers(chunk, named.__getitem__, first + begin)
            check_answers(answers, named.__getitem__)
            found += answers
        return found

    def answers_or_errors(
        self, examples: Sequence[Value], where: Where, first: int = 0
    ) -> list[Record | UserError]:
        """Returns the answer to each example, or the error if there is none; an example may itself
        be an error.
        """
        errors = [example if isinstance(example, UserError) else None for example in examples]
        if not any(errors):
            try:
                return [*self.answers(examples, where, first)]
            except UserError as error:
                if len(examples) == 1:
                    return [error]
        for index, example in enumerate(examples):
            errors[index] = errors[index] or self.error(example, where(index))
        good = [example for example, error in zip(examples, errors, strict=True) if error is None]
        if not good:
            return [error for error in errors if error is not None]
        # A good example replaces a bad one, so that the rows, and the random draws of each, stay
        # the same.
        filled = [
            good[0] if error else example for example, error in zip(examples, errors, strict=True)
        ]
        try:
            found = self.answers(filled, where, first)
        except (
            UserError
        ):  # they are incompatible, such as choices with different numbers of endings
            return [
                self.answers_or_errors([example], [where(index)].__getitem__, first + index)[0]
                for index, example in enumerate(examples)
            ]
        return [error or answer for answer, error in zip(found, errors, strict=True)]

    def error(self, example: Value, place: str) -> UserError | None:
        """Returns why an example cannot be read, None if it can."""
        try:
            self.read([example], [place].__getitem__)
        except UserError as error:
            return error
        return None


def add_flags(flags: Flags) -> None:
    """Adds the flags for prediction: FLAGS, the generation settings, and the seed."""
    flags.add("--max_new_tokens", type=int, help="maximum number of tokens to generate")
    flags.add(
        "--temperature",
        type=float,
        help="sampling temperature; 0 always takes the most likely token",
    )
    flags.add("--top_k", type=int, help="sample from the K most likely tokens")
    flags.add(
        "--top_p",
        type=float,
        help="sample from the most likely tokens whose total probability is P",
    )
    flags.add("--num_beams", type=int, help="number of beams for beam search")
    flags.add("--seed", type=int, help="seed for sampling (default: 0)")


def chosen(given: Mapping[str, Value], own: Mapping[str, Value]) -> Config:
    """Returns generation settings with implied settings added.

    A temperature, `top_k`, `top_p` or `min_p` means sampling, of all tokens unless they or the
    model's `own` settings say otherwise; temperature 0 always takes the most likely token;
    `num_beams` means beam search. With `do_sample`, nothing is added.

    Raises UserError if sampling settings are given with temperature 0.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if "do_sample" in given:
        return given
    drawn = [name for name in SAMPLING if name in given]
    if given.get("temperature") == 0:
        if len(drawn) > 1:
            raise UserError(
                f"temperature=0 always takes the most likely token, so {drawn[1]} has no effect; "
                "leave one of them out"
            )
        return {name: value for name, value in given.items() if name != "temperature"} | {
            "do_sample": False
        }
    if drawn:
        return {"top_k": own.get("top_k", 0), "num_beams": 1, "do_sample": True} | given
    return {"do_sample": False} | given if given.get("num_beams", 1) != 1 else given


def generation_settings(
    layers: Sequence[Mapping[str, Value]], given: Mapping[str, Value], seed: int | None
) -> Generation:
    """Returns the combined generation settings of a model, in layers of which later ones win, and
    of the user.

    Raises UserError for settings that are unknown, incompatible, or without effect.
    """
    own = {name: value for layer in layers for name, value in layer.items() if value is not None}
    settings = merge(*layers, chosen(given, own))
    if settings.num_return_sequences != 1:
        raise UserError(
            f"num_return_sequences={settings.num_return_sequences}: predict gives one answer per "
            "example; repeat the example instead, or use .generate with input_ids"
        )
    if seed is not None:
        if not 0 <= seed < SEEDS:
            raise UserError(f"seed={seed}: must be a whole number from 0 to {SEEDS - 1}")
        if not settings.do_sample:
            raise UserError(
                f"seed={seed} has no effect, as nothing is sampled; set a temperature too"
            )
    return settings


def check_prompts(prompts: object, arrays: Sequence[str], scored: bool) -> None:
    """Raises UserError unless prompts are a text or texts, without arguments that only apply to
    arrays.
    """
    if not isinstance(prompts, str):
        listed = prompts if isinstance(prompts, list | tuple) else [prompts]
        for number, prompt in enumerate(listed):
            if not isinstance(prompt, str):
                raise UserError(
                    f"prompt {number}: is {type(prompt).__name__}, not text; pass texts, or token "
                    "ids as input_ids=..."
                )
    if arrays:
        raise UserError(f"prompts and {arrays[0]} were both given; leave one of them out")
    if scored:
        raise UserError("return_scores=True needs token ids; pass input_ids, or leave it out")


def chunk_of(heads: Iterable[str], sized: Sequence[str]) -> int:
    """Returns the number of examples to read at once when computing each head's output."""
    return WINDOW if sized and not set(heads) & set(PER_TOKEN) else CHUNK


def head_outputs(
    features: Callable[[HostBatch], Mapping[str, PyTree]],
    heads: Iterable[str],
    processors: Processors,
    sized: Sequence[str],
    positions: int,
    borders: Sequence[int],
    batch: Mapping[str, PyTree],
    first: int,
) -> dict[str, np.ndarray]:
    """Returns each head's output for a task's batch, without what stays on the host.

    Rows of similar length are computed together. Arrays whose last axis is a length, `sized`, are
    padded to the next of `borders`, the lengths of the run's batches, or by the processors, up to
    `positions` (0: any length). Outputs per token are padded with zeros.
    """
    arrays = {name: array for name, array in batch.items() if not name.startswith("_")}
    # An example, such as a question about a long text, may have many rows.
    count = len(next(iter(arrays.values())))
    lengths = row_lengths(arrays, sized, count)
    order = np.argsort(lengths, kind="stable")
    parts = []
    for begin in range(0, count, CHUNK):
        rows = order[np.minimum(np.arange(begin, begin + min(count, CHUNK)), count - 1)]
        longest = int(lengths[rows].max())
        part = {
            name: array[rows][..., :longest] if name in sized and longest else array[rows]
            for name, array in arrays.items()
        }
        most = next((border for border in borders if border >= longest), positions)
        for processor in processors.values():
            part = processor.pad(part, sized, most)
        outputs = features(part)
        parts.append(jax.device_get({kind: outputs[kind] for kind in heads}))
    place = np.argsort(order)
    return {kind: joined([part[kind] for part in parts])[:count][place] for kind in heads}


def row_lengths(arrays: HostBatch, sized: Sequence[str], count: int) -> np.ndarray:
    """Returns the length of each of `count` rows [count], up to its last token; 0 if rows have
    none.
    """
    mask = arrays.get("attention_mask")
    if mask is None or "attention_mask" not in sized:
        return np.zeros(count, np.int64)
    ends = np.where(np.asarray(mask) > 0, 1 + np.arange(mask.shape[-1]), 0)
    return np.asarray(ends.reshape(count, -1).max(axis=1, initial=0))


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the rows of all parts; those of shorter parts are padded with zeros on the second
    axis.
    """
    if parts[0].ndim > 1:
        width = max(part.shape[1] for part in parts)
        others = ((0, 0),) * (parts[0].ndim - 2)
        parts = [np.pad(part, ((0, 0), (0, width - part.shape[1]), *others)) for part in parts]
    return np.concatenate(parts)
