"""Makes the golden folders in `generation/` beside this file: tiny random models, prompts, and what the reference generates.

    pip install -e '.[parity]'
    python tests/golden/make_generation.py

Each folder is a Hugging Face folder plus `expected.json`: the inputs, and a list of [settings, tokens]. Beside it, `scores.json`
has the inputs (of encoder-decoders with prompts of the decoder), and a list of [settings, tokens, log-probabilities, scores].
Weights are drawn at an order that makes no model say one token forever; which tokens end a row is chosen among those that come
often.
Made with torch 2.13.0 and transformers 5.24.0; `tests/parity/test_generation.py` does the same live, with more models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

PAD, START = 60, 59
SIZES: dict[str, Any] = {"vocab_size": 61, "bos_token_id": None, "eos_token_id": None}
SIDES = {f"{side}_{part}": number for side in ("encoder", "decoder")
         for part, number in (("layers", 2), ("attention_heads", 3), ("ffn_dim", 29))}  # fmt: skip
STARTED = SIZES | {"pad_token_id": PAD, "decoder_start_token_id": START}
# A Marian has to name what ends a text: the padding, which the cases override.
MARIAN = STARTED | SIDES | {"d_model": 24, "max_position_embeddings": 48, "forced_eos_token_id": None, "eos_token_id": PAD}

# Orders of the lively draw. What reads the memory, which is the same at every step, is small, and so are tied words, which say
# the last one again. Post-norm layers forget it, but every step must see other tokens: sharp attention, a weak MLP.
CROSSING = ("encoder_attn.out_proj.weight", "EncDecAttention.o.weight")
WORDS = ("wte.weight", "embed_tokens.weight", "shared.weight")
PRE_NORM = {CROSSING: 0.15, WORDS: 0.2, (".weight",): 0.5}
POST_NORM = {CROSSING: 0.05, WORDS: 1.0, ("q_proj.weight", "k_proj.weight"): 3.0, ("fc1.weight", "fc2.weight"): 0.1,
             (".weight",): 0.3}  # fmt: skip

# Family -> the reference's class and settings.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", SIZES | {"n_embd": 21, "n_layer": 2, "n_head": 3, "n_positions": 48}),
    "llama": (
        "LlamaForCausalLM",
        SIZES | {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "intermediate_size": 31, "tie_word_embeddings": False},
    ),
    "t5": ("T5ForConditionalGeneration", STARTED | {"d_model": 20, "d_kv": 7, "num_heads": 3, "num_layers": 2, "d_ff": 29}),
    "t5_gated": (
        "T5ForConditionalGeneration",
        STARTED | {"d_model": 20, "d_kv": 7, "num_heads": 3, "num_layers": 2, "d_ff": 29, "feed_forward_proj": "gated-gelu",
                   "tie_word_embeddings": False, "pad_token_id": 0},
    ),
    "marian": ("MarianMTModel", MARIAN),
    "marian_untied": (
        "MarianMTModel",
        MARIAN | {"scale_embedding": True, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": 61,
                  "tie_word_embeddings": False},
    ),
}  # fmt: skip

# Of the lively draws, those that say most different tokens.
SEEDS = {"gpt2": 5, "llama": 2, "t5": 2, "t5_gated": 8, "marian": 7, "marian_untied": 11}

GOLDEN = ("gpt2", "t5_gated", "marian")

# Settings that tell the ways of deciding apart. (To the reference, padding before a prompt is a token that may not come again.)
CASES: list[dict[str, Any]] = [
    {},
    {"num_beams": 3},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "num_return_sequences": 3},
    {"num_beams": 3, "length_penalty": -1.0, "early_stopping": "never"},
    {"num_beams": 2, "length_penalty": 1.5, "early_stopping": "never", "num_return_sequences": 2},
    {"num_beams": 5, "length_penalty": 0.0, "num_return_sequences": 5, "pad_token_id": 0},
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2, "bad_words_ids": [[PAD]]},
    {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 6, "bad_words_ids": [[PAD]]},
    {"min_length": 14, "bad_words_ids": [[3], [11, 12], [18, 42], [7]]},
    {"num_beams": 3, "forced_eos_token_id": 8, "max_new_tokens": 5, "early_stopping": True},
    {"num_beams": 2, "suppress_tokens": [1, 2, 30], "begin_suppress_tokens": [*range(0, 60, 3)], "renormalize_logits": True},
    {"forced_bos_token_id": 13, "num_beams": 2, "no_repeat_ngram_size": 1, "bad_words_ids": [[PAD]]},
]
# Settings for scores, and for prompts of decoders.
SCORED: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_length": 9},
    {"num_beams": 3, "length_penalty": 2.0, "num_return_sequences": 2},
    {"num_beams": 4, "length_penalty": -1.0, "early_stopping": "never", "num_return_sequences": 4},
    {"num_beams": 3, "length_penalty": 0.0, "repetition_penalty": 1.3, "min_new_tokens": 6, "max_length": 15},
    {"num_beams": 2, "forced_bos_token_id": 13, "begin_suppress_tokens": [*range(0, 60, 3)], "early_stopping": True},
]
FILTERS: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_k": 5},
    {"top_k": 0, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.6, "min_p": 0.2},
    {"top_k": 0, "min_p": 0.05, "repetition_penalty": 1.7},
    {"top_k": 200, "top_p": 0.05, "renormalize_logits": True},
    {"no_repeat_ngram_size": 1, "top_p": 0.95},
]


def reference(family: str, seed: int, scale: float) -> Any:
    """Returns a model of the reference in evaluation mode, every parameter drawn anew but fixed sinusoids.

    Scale 0 draws matrices alone, at orders that make no model say one token forever.
    """
    name, settings = FAMILIES[family]
    torch.manual_seed(seed)
    model = getattr(transformers, name)
    model = model(model.config_class(**settings)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if family.startswith("marian") and "embed_positions" in key:
                continue
            drawn = torch.randn_like(parameter)
            if scale:
                norm = key.endswith("weight") and ("norm" in key or "ln_" in key)
                parameter.copy_(1 + scale * drawn if norm else scale * drawn)
            elif parameter.ndim > 1:
                orders = POST_NORM if family.startswith("marian") else PRE_NORM
                parameter.copy_(next(order for ends, order in orders.items() if key.endswith(ends)) * drawn)
    return model


def inputs(family: str, rows: int, length: int, seed: int) -> dict[str, np.ndarray]:
    """Returns prompts padded at the side that the reference asks for: left, and right for an encoder."""
    rng = np.random.default_rng(seed)
    ids, mask = rng.integers(1, START, (rows, length)), np.ones((rows, length), np.int64)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    if "decoder_start_token_id" in FAMILIES[family][1]:
        mask = mask[:, ::-1].copy()
    return {"input_ids": np.where(mask, ids, PAD), "attention_mask": mask}


def tokens(model: Any, arrays: dict[str, np.ndarray], settings: dict[str, Any]) -> np.ndarray:
    """Returns what the reference generates."""
    with torch.no_grad():
        return model.generate(**{name: torch.from_numpy(array) for name, array in arrays.items()}, **settings).numpy()


def prompts(arrays: dict[str, np.ndarray], length: int, seed: int, start: int | None = START) -> dict[str, np.ndarray]:
    """Returns the inputs with prompts of the decoder, which begin with the start token unless that is None."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, START, (len(arrays["input_ids"]), length))
    if start is not None:
        ids[:, 0] = start
    return arrays | {"decoder_input_ids": ids}


def scored(model: Any, arrays: dict[str, np.ndarray], settings: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns what the reference generates, with summed log-probabilities, and scores (of beams, as it ranks them)."""
    beams = settings.get("num_beams", 1) > 1
    with torch.no_grad():
        given = {name: torch.from_numpy(array) for name, array in arrays.items()}
        out = model.generate(**given, **settings, return_dict_in_generate=True, output_scores=True)
        chosen = out.beam_indices if beams else None
        steps = model.compute_transition_scores(out.sequences, out.scores, chosen, normalize_logits=not beams).numpy()
    if not beams:
        new = out.sequences.numpy()[:, out.sequences.shape[1] - steps.shape[1] :]
        ended = np.cumsum(np.isin(new, settings["eos_token_id"]), axis=1) - np.isin(new, settings["eos_token_id"])
        steps = np.where(ended, 0, steps)
    totals = steps.sum(axis=1)
    return out.sequences.numpy(), totals, out.sequences_scores.numpy() if beams else totals


def scored_cases(ends: np.ndarray) -> list[dict[str, Any]]:
    """Returns the settings of SCORED, with ends as `cases` has them."""
    given = {"max_new_tokens": 12, "eos_token_id": ends[-2:].tolist(), "pad_token_id": PAD}
    return [{name: value for name, value in given.items() if name != "max_new_tokens" or "max_length" not in case} | case
            for case in SCORED]  # fmt: skip


def frequent(model: Any, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the ids that greedy and beam search choose without an end, the most frequent first, without the padding."""
    settings = {"max_new_tokens": 18, "pad_token_id": PAD}
    width = arrays["input_ids"].shape[1] if not model.config.is_encoder_decoder else 1
    made = [tokens(model, arrays, settings | {"num_beams": beams, "no_repeat_ngram_size": size})
            for beams, size in ((1, 0), (3, 0), (1, 2))]  # fmt: skip
    found, counts = np.unique(np.concatenate([part[:, width:].ravel() for part in made]), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return found[order][found[order] != PAD][:6]


def cases(ends: np.ndarray) -> list[dict[str, Any]]:
    """Returns all settings of a model: one of its frequent ids ends a row, or either of two, at different steps."""
    several = []
    for number, case in enumerate(CASES):
        end = ends[[(number + 1) % len(ends)]] if number % 4 else ends[-2:]
        several.append({"max_new_tokens": 18, "eos_token_id": end.tolist(), "pad_token_id": PAD} | case)
    return several


def main() -> None:
    """Writes all folders."""
    for family in GOLDEN:
        folder, seed = Path(__file__).parent / "generation" / family, SEEDS[family]
        model = reference(family, seed, 0)
        arrays = inputs(family, rows=3, length=9, seed=seed)
        model.save_pretrained(folder)
        expected = [[case, tokens(model, arrays, case).tolist()] for case in cases(frequent(model, arrays))]
        write(folder / "expected.json", arrays, expected)
        prompted = prompts(arrays, 4, seed) if model.config.is_encoder_decoder else arrays
        results = [(case, scored(model, prompted, case)) for case in scored_cases(frequent(model, arrays))]
        write(folder / "scores.json", prompted, [[case, *(part.tolist() for part in parts)] for case, parts in results])


def write(file: Path, arrays: dict[str, np.ndarray], expected: list[Any]) -> None:
    """Writes inputs and cases."""
    lists = {name: array.tolist() for name, array in arrays.items()}
    file.write_text(json.dumps({"inputs": lists, "cases": expected}) + "\n")


if __name__ == "__main__":
    main()
