"""How text is generated: settings with the names and defaults of the reference's GenerationConfig, from files and arguments.

`merged(file, arguments)` makes a `Generation`; `generate.generate` obeys it. What the reference knows and this does not handle
is refused by name, unless it has no effect.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import UserError, nearest

GENERATION = "generation_config.json"
DEFAULT_ROOM = 20  # new tokens where no length is given, as in the reference

# Settings that change no token: bookkeeping, what is returned beside the tokens, and the reference's own ways of computing.
UNREAD = (
    *("assistant_confidence_threshold", "assistant_lookbehind", "cache_config", "cache_implementation", "compile_config"),
    *("disable_compile", "is_assistant", "max_cache_len", "max_matching_ngram_size", "num_assistant_tokens"),
    *("num_assistant_tokens_schedule", "output_attentions", "output_hidden_states", "output_logits", "output_scores"),
    *("prefill_chunk_size", "return_dict_in_generate", "target_lookbehind", "transformers_version", "use_cache"),
    *("_commit_hash", "_from_model_config"),
)
# Settings of the reference that are handled with this value alone (or none, or zero).
FIXED: dict[str, Any] = {
    **dict.fromkeys(("assistant_early_exit", "assistant_ensemble_weight", "constraints", "dola_layers")),
    **dict.fromkeys(("exponential_decay_length_penalty", "force_words_ids", "low_memory", "max_time", "penalty_alpha")),
    **dict.fromkeys(("prompt_lookup_num_tokens", "remove_invalid_values", "sequence_bias", "speculation_type")),
    **dict.fromkeys(("stop_strings", "token_healing", "top_h", "use_mtp", "watermarking_config")),
    **{"diversity_penalty": 0.0, "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "epsilon_cutoff": 0.0},
    **{"eta_cutoff": 0.0, "guidance_scale": 1.0, "num_beam_groups": 1, "typical_p": 1.0},
}
# A length counted from the prompt's beginning, and its twin counted from the prompt's end, which wins in the same place.
TWINS = (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))


@dataclasses.dataclass(frozen=True)
class Generation:
    """Settings of generation. Lengths and ids that are None are not given; sequences are tuples, so that it can be hashed."""

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
        """The id that fills up rows which have ended: that of padding or, as in the reference, of the end."""
        return self.pad_token_id if self.pad_token_id is not None else (*self.eos_token_id, 0)[0]

    @property
    def infers_padding(self) -> bool:
        """Whether padding ids in a prompt without a mask can only be padding, as the reference decides it."""
        return self.pad_token_id is not None and self.pad_token_id not in self.eos_token_id

    def limits(self, width: int, positions: int = 0) -> tuple[int, int]:
        """Returns how many tokens at most, and how many before the first that ends, follow a prompt of `width` columns.

        `positions` are the model's, 0 being no limit. Raises UserError if the prompt leaves no room.
        """
        most = self.max_new_tokens
        if most is None and self.max_length is not None:
            most = self.max_length - width
            if most < 1:
                raise UserError(f"max_length={self.max_length} leaves no room after {width} tokens; give max_new_tokens instead")
        if most is None:
            most = max(min(DEFAULT_ROOM, positions - width), 1) if positions else DEFAULT_ROOM
        if positions and width + most - 1 > positions:
            raise UserError(
                f"{width} tokens and {most} new ones are more than the {positions} positions of the model; "
                "shorten the prompt, or lower max_new_tokens"
            )
        least = self.min_new_tokens
        if least is None:
            least = max((self.min_length or 0) - width, 0)
        return most, least


POSITIVE = ("max_new_tokens", "max_length", "num_beams", "num_return_sequences")
COUNTS = ("min_new_tokens", "min_length", "top_k", "no_repeat_ngram_size")
IDS = ("forced_bos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id")
SEQUENCES = ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id", "eos_token_id")
SWITCHES = ("do_sample", "renormalize_logits")


def whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def are_ids(value: Any) -> bool:
    return type(value) is tuple and all(whole(number, 0) for number in value)


def finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def check(settings: Generation) -> None:
    """Raises UserError for a value that cannot be meant, and for values that exclude each other."""
    for name, value in dataclasses.asdict(settings).items():
        optional = value is None and Generation.__dataclass_fields__[name].default is None
        needs = ""
        if name in POSITIVE and not (optional or whole(value, 1)):
            needs = "must be a whole number, 1 or more"
        elif name in (*COUNTS, *IDS) and not (optional or whole(value, 0)):
            needs = "must be a whole number, 0 or more"
        elif name in SEQUENCES and not are_ids(value):
            needs = "must be token ids"
        elif name == "bad_words_ids" and not (type(value) is tuple and all(word and are_ids(word) for word in value)):
            needs = "must be lists of token ids, one a word"
        elif name in SWITCHES and type(value) is not bool:
            needs = "must be true or false"
        elif name in ("temperature", "repetition_penalty") and not (finite(value) and value > 0):
            needs = "must be a number above 0"
        elif name in ("top_p", "min_p") and not (optional or (finite(value) and 0 <= value <= 1)):
            needs = "must be a number from 0 to 1"
        elif name == "length_penalty" and not finite(value):
            needs = "must be a number"
        elif name == "early_stopping" and not (type(value) is bool or value == "never"):
            needs = 'must be true, false or "never"'
        if needs:
            raise UserError(f"{name}={json.dumps(value, default=str)} {needs}; correct it")
    if settings.do_sample and settings.num_beams > 1:
        raise UserError(f"do_sample=true with num_beams={settings.num_beams} is not handled; set one of them back")
    if settings.num_return_sequences > 1 and not settings.do_sample and settings.num_return_sequences > settings.num_beams:
        wanted = settings.num_return_sequences
        raise UserError(f"num_return_sequences={wanted} needs do_sample=true or num_beams={wanted} at least; set one of them")


def merged(*layers: Mapping[str, Any]) -> Generation:
    """Returns the settings of several places, later ones winning; None is not given.

    Raises UserError naming each setting that is not handled or not known.
    """
    fields = Generation.__dataclass_fields__
    values: dict[str, Any] = {}
    refused: list[str] = []
    for layer in layers:
        given = {name: value for name, value in layer.items() if value is not None}
        for pair in TWINS:
            if any(name in given for name in pair):
                values = {name: value for name, value in values.items() if name not in pair}
        values |= {name: value for name, value in given.items() if name in fields}
        for name, value in given.items():
            if name in fields or name in UNREAD or (name in FIXED and value in (FIXED[name], False, 0)):
                continue
            if name not in FIXED:
                raise UserError(f'"{name}" is not a setting of generation{nearest(name, fields)}; there are {", ".join(fields)}')
            only = "" if FIXED[name] is None else f" (only {json.dumps(FIXED[name])} is)"
            refused.append(f"{name}={json.dumps(value, default=str)}{only}")
    if refused:
        raise UserError(f"generation: not handled: {', '.join(refused)}; leave it out")
    return Generation(**{name: frozen(name, value) for name, value in values.items()})


def frozen(name: str, value: Any) -> Any:
    """Returns a setting's value as its field has it: numpy's as Python's, lists as tuples, and a single id as a tuple where there
    may be several."""
    value = plain(value)
    return (value,) if name in SEQUENCES and isinstance(value, int) else value


def plain(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(plain(part) for part in value) if isinstance(value, list | tuple) else value


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of generation that a model's old config.json holds."""
    known = {*Generation.__dataclass_fields__, *FIXED}
    return {name: value for name, value in config.items() if name in known}


def special_tokens(tokenizer: Tokenizer, model_settings: Any) -> dict[str, Any]:
    """Returns the ids of padding, end and start, as far as there are any."""
    ids = {role: tokenizer.pieces.tokens.index(name) for role, name in tokenizer.roles.items()}
    start = getattr(model_settings, "start_id", None)
    named = {"pad_token_id": ids.get("pad"), "eos_token_id": ids.get("eos", ids.get("sep")), "decoder_start_token_id": start}
    return {name: value for name, value in named.items() if value is not None}
