"""Settings of text generation from files and arguments, with the names and defaults of
transformers' GenerationConfig.

`merge(file, arguments)` returns the `Generation` for `loop.generate`. Unsupported settings of the
reference are errors, unless they have no effect.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping

import jax
import numpy as np

from fmjax.contracts import Config, Encodes, Generates, Model, Processors, PyTree, Task, Value
from fmjax.data.kinds import text
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import UserError, nearest

GENERATION = "generation_config.json"
DEFAULT_NEW_TOKENS = 20  # the default length, as in the reference

# Settings that do not affect tokens: bookkeeping, additional outputs, and the reference's
# computation options.
UNREAD = (
    *("assistant_confidence_threshold", "assistant_lookbehind", "cache_config"),
    *("cache_implementation", "compile_config", "disable_compile", "is_assistant"),
    *("max_cache_len", "max_matching_ngram_size", "num_assistant_tokens"),
    *("num_assistant_tokens_schedule", "output_attentions", "output_hidden_states"),
    *("output_logits", "output_scores", "prefill_chunk_size", "return_dict_in_generate"),
    *("target_lookbehind", "transformers_version", "use_cache", "_commit_hash"),
    "_from_model_config",
)
# Settings of the reference that are supported only with this value (or none, or zero).
FIXED: Config = {
    **dict.fromkeys(("assistant_early_exit", "assistant_ensemble_weight", "constraints")),
    **dict.fromkeys(("dola_layers", "exponential_decay_length_penalty", "force_words_ids")),
    **dict.fromkeys(("low_memory", "max_time", "penalty_alpha", "prompt_lookup_num_tokens")),
    **dict.fromkeys(("remove_invalid_values", "sequence_bias", "speculation_type")),
    **dict.fromkeys(("stop_strings", "token_healing", "top_h", "use_mtp", "watermarking_config")),
    **{"diversity_penalty": 0.0, "encoder_no_repeat_ngram_size": 0, "guidance_scale": 1.0},
    **{"encoder_repetition_penalty": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0},
    **{"num_beam_groups": 1, "typical_p": 1.0},
}
# A length that includes the prompt, and its counterpart that does not. The counterpart wins if one
# place sets both.
TWINS = (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))


@dataclasses.dataclass(frozen=True)
class Generation:
    """Settings of generation. None means unset. Sequences are tuples, so that this is hashable.

    Raises UserError for a value out of range, and for values that exclude each other.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None  # of prompt and continuation together
    min_new_tokens: int | None = None
    min_length: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50  # 0: all
    top_p: float = 1.0
    min_p: float | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False  # or "never"
    num_return_sequences: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    renormalize_logits: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    decoder_start_token_id: int | None = None

    def __post_init__(self) -> None:
        check(self)

    @property
    def pad(self) -> int:
        """The id that pads rows after their end: the padding token or, as in the reference, the end
        token."""
        return self.pad_token_id if self.pad_token_id is not None else (*self.eos_token_id, 0)[0]

    @property
    def infers_padding(self) -> bool:
        """Whether padding ids in a prompt without a mask must be padding, by the reference's
        rule."""
        return self.pad_token_id is not None and self.pad_token_id not in self.eos_token_id

    def limits(self, prompt_length: int, positions: int = 0) -> tuple[int, int]:
        """Returns the maximum and minimum number of new tokens of a row.

        `prompt_length` counts columns. `positions` is the model's limit; 0 means none. Raises
        UserError if the prompt leaves no room.
        """
        most = self.max_new_tokens
        if most is None and self.max_length is not None:
            most = self.max_length - prompt_length
            if most < 1:
                raise UserError(
                    f"max_length={self.max_length} leaves no room after the {prompt_length} tokens "
                    "of the prompt; pass max_new_tokens instead"
                )
        if most is None:
            room = positions - prompt_length if positions else DEFAULT_NEW_TOKENS
            most = max(min(DEFAULT_NEW_TOKENS, room), 1)
        if positions and prompt_length + most - 1 > positions:
            raise UserError(
                f"{prompt_length} tokens and {most} new ones exceed the {positions} positions of "
                "the model; shorten the prompt, or lower max_new_tokens"
            )
        least = self.min_new_tokens
        if least is None:
            least = max((self.min_length or 0) - prompt_length, 0)
        return most, least


def token_limit(settings: PyTree) -> int:
    """Returns the most tokens that a model of these settings reads; 0 is no limit.

    It is the size of the position table or, of rotary positions, which have none, the `context`
    that the model is meant for.
    """
    known = vars(settings)
    return int(known.get("positions", 0) or known.get("context", 0))


def is_whole(value: Value, least: int = 0) -> bool:
    return type(value) is int and value >= least


def is_number(value: Value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def are_ids(value: Value) -> bool:
    return type(value) is tuple and all(map(is_whole, value))


SEQUENCES = ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id", "eos_token_id")

# Requirements on values: the description, the test, and the settings.
RULES: tuple[tuple[str, Callable[[Value], bool], tuple[str, ...]], ...] = (
    (
        "must be a whole number, 1 or more",
        lambda value: is_whole(value, 1),
        ("max_new_tokens", "max_length", "num_beams", "num_return_sequences"),
    ),
    (
        "must be a whole number, 0 or more",
        is_whole,
        (
            *("min_new_tokens", "min_length", "top_k", "no_repeat_ngram_size", "pad_token_id"),
            *("bos_token_id", "forced_bos_token_id", "decoder_start_token_id"),
        ),
    ),
    ("must be token ids", are_ids, SEQUENCES),
    (
        "must be lists of token ids, one per word",
        lambda value: type(value) is tuple and all(word and are_ids(word) for word in value),
        ("bad_words_ids",),
    ),
    (
        "must be true or false",
        lambda value: type(value) is bool,
        ("do_sample", "renormalize_logits"),
    ),
    (
        "must be a number above 0",
        lambda value: is_number(value) and value > 0,
        ("temperature", "repetition_penalty"),
    ),
    (
        "must be a number from 0 to 1",
        lambda value: is_number(value) and 0 <= value <= 1,
        ("top_p", "min_p"),
    ),
    ("must be a number", is_number, ("length_penalty",)),
    (
        'must be true, false or "never"',
        lambda value: type(value) is bool or value == "never",
        ("early_stopping",),
    ),
)


def check(settings: Generation) -> None:
    """Raises UserError for a value out of range, and for values that exclude each other."""
    values, fields = dataclasses.asdict(settings), Generation.__dataclass_fields__
    for needs, valid, names in RULES:
        for name in names:
            not_given = values[name] is None and fields[name].default is None
            if not (not_given or valid(values[name])):
                raise UserError(
                    f"{name}={json.dumps(values[name], default=str)} {needs}; correct it"
                )
    beams, returned = settings.num_beams, settings.num_return_sequences
    if settings.do_sample and beams > 1:
        raise UserError(
            f"do_sample=true with num_beams={beams} is not supported; leave one of them out"
        )
    if returned > 1 and not settings.do_sample and returned > beams:
        raise UserError(
            f"num_return_sequences={returned} needs do_sample=true or num_beams of at least "
            f"{returned}; set one of them"
        )


def merge(*layers: Mapping[str, Value]) -> Generation:
    """Returns the combined settings of several places; later ones win. None means unset.

    Raises UserError, naming each unknown or unsupported setting.
    """
    fields = Generation.__dataclass_fields__
    values: Config = {}
    refused: list[str] = []
    for layer in layers:
        given = {name: value for name, value in layer.items() if value is not None}
        for pair in TWINS:
            if any(name in given for name in pair):
                values = {name: value for name, value in values.items() if name not in pair}
        values |= {name: value for name, value in given.items() if name in fields}
        for name, value in given.items():
            if (
                name in fields
                or name in UNREAD
                or (name in FIXED and value in (FIXED[name], False, 0))
            ):
                continue
            if name not in FIXED:
                hint = nearest(name, fields)
                raise UserError(
                    f'"{name}" is not a generation setting{hint}; choose from {", ".join(fields)}'
                )
            only = "" if FIXED[name] is None else f" (only {json.dumps(FIXED[name])} is)"
            refused.append(f"{name}={json.dumps(value, default=str)}{only}")
    if refused:
        raise UserError(f"generation: not supported: {', '.join(refused)}; leave it out")
    return Generation(**{name: field_value(name, value) for name, value in values.items()})


def field_value(name: str, value: Value) -> Value:
    """Returns a setting's value in the form of its field: an id becomes a tuple if several are
    allowed."""
    value = plain(value)
    return (value,) if name in SEQUENCES and isinstance(value, int) else value


def plain(value: Value) -> Value:
    """Returns NumPy and JAX values as Python values, and lists as tuples."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        value = value.tolist()
    return tuple(plain(part) for part in value) if isinstance(value, list | tuple) else value


def from_config(config: Mapping[str, Value]) -> Config:
    """Returns the generation settings in a model's old-style config.json."""
    known = {*Generation.__dataclass_fields__, *FIXED}
    return {name: value for name, value in config.items() if name in known}


def special_tokens(tokenizer: Tokenizer, model: object) -> Config:
    """Returns the ids of a tokenizer's padding and end tokens, and of the start token of a model's
    decoder, if they exist."""
    ids = {role: tokenizer.pieces.tokens.index(name) for role, name in tokenizer.roles.items()}
    named = {
        "pad_token_id": ids.get("pad"),
        "eos_token_id": ids.get("eos", ids.get("sep")),
        "decoder_start_token_id": model.start_id if isinstance(model, Encodes) else None,
    }
    return {name: value for name, value in named.items() if value is not None}


def settings_for(tokenizer: Tokenizer, given: Mapping[str, Value], model: object) -> Generation:
    """Returns the settings `given`; missing special tokens come from the tokenizer and the model.

    Raises UserError like `merge`.
    """
    return merge(special_tokens(tokenizer, model), given)


def check_generation(task: Task, model: Model, processors: Processors, length: int) -> None:
    """Raises UserError if a task's generation settings are invalid, or need more positions than the
    model has."""
    if task.generation is not None and "text" in processors and isinstance(model, Generates):
        settings = settings_for(processors.of(text.Processor).tokenizer, task.generation, model)
        if task.needs_generation:
            settings.limits(1 if isinstance(model, Encodes) else length, model.settings.positions)
