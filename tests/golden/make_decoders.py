"""Makes the golden folders of GPT-2 and Llama with its kin: `decoders/`, beside this file. See make.py.

pip install -e '.[parity]'
python tests/golden/make_decoders.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden import make

GPT2 = {"vocab_size": 41, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 31, "n_positions": 40}
# Four query heads on two key heads, a width that is no power of two, an epsilon whose change would show.
LLAMA = {
    "vocab_size": 41,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 31,
    "max_position_embeddings": 40,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 20,
}
LINEAR = {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.5}
ALL_BIASES = {"attention_bias": True, "mlp_bias": True, "head_dim": 10, "tie_word_embeddings": True}
END = {"bos_token_id": 1, "eos_token_id": 2}
LABELS = make.LABELS | {"pad_token_id": 0}

# Folder -> the reference's class and settings.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2_lm": ("GPT2LMHeadModel", GPT2 | END),
    "gpt2_classify": ("GPT2ForSequenceClassification", GPT2 | END | LABELS | {"n_layer": 1}),
    "llama_lm": ("LlamaForCausalLM", LLAMA),
    "llama_biases": ("LlamaForCausalLM", LLAMA | ALL_BIASES | {"rope_parameters": LLAMA3}),
    "llama_classify": ("LlamaForSequenceClassification", LLAMA | LABELS | {"num_hidden_layers": 1, "rope_parameters": LINEAR}),
    "mistral_lm": ("MistralForCausalLM", LLAMA | {"sliding_window": 5}),
    "qwen2_lm": ("Qwen2ForCausalLM", LLAMA | {"tie_word_embeddings": True}),
}


def reference(name: str, settings: dict[str, Any], seed: int, scale: float = 0.3) -> Any:
    """Returns a model of the reference, its parameters drawn anew; the norms of GPT-2, `ln_*`, around 1 too."""
    model = make.reference(name, settings, seed, scale)
    with torch.no_grad():
        for key, parameter in model.named_parameters() if scale else ():
            if ".ln_" in key and key.endswith("weight"):
                parameter.add_(1)
    return model


def inputs(model: Any, rows: int, length: int, seed: int) -> dict[str, np.ndarray]:
    """Returns inputs with padding at the end and holes, so small that every position sees a key within Mistral's window.

    A position without any has another meaning from one kernel of the reference to the next.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, model.config.vocab_size, (rows, length))
    mask = np.ones((rows, length), np.int64)
    mask[0, length - 4 :] = 0
    mask[1, 1:4] = 0
    mask[2:, 2::2] = rng.random(mask[2:, 2::2].shape) < 0.5
    if model.config.pad_token_id is not None:
        ids[mask == 0] = model.config.pad_token_id
    return {"input_ids": ids, "attention_mask": mask}


def outputs(model: Any, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the reference's outputs, with those of its body, as numpy arrays."""
    model.config.use_cache = False
    return make.outputs(model, arrays)


def main() -> None:
    """Writes all folders."""
    for seed, (case, (name, settings)) in enumerate(CASES.items()):
        folder = Path(__file__).parent / "decoders" / case
        model = reference(name, settings, seed)
        model.save_pretrained(folder)
        arrays = inputs(model, 3, 17, seed)
        np.savez_compressed(folder / "expected.npz", **arrays, **outputs(model, arrays))


if __name__ == "__main__":
    main()
