"""The peer's side of parity: tiny models with random weights, their inputs and their outputs, by
transformers and torch on the CPU in fp32 and bf16.

    python -m fmjax.bench.peer_outputs FOLDER

writes FOLDER/NAME/ in Hugging Face's layout, with `inputs.npz` and `outputs.npz`, for each name in
MODELS.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

ROWS, LENGTH, TARGET = 3, 160, 136  # long enough for attention kernels
VOCABULARY, WIDTH, LAYERS, HEADS, INNER = 211, 64, 2, 4, 96
# Of weights and biases: at the usual initialization, a missing bias would not show. T5 does not
# divide its scores by a root of the width, and rounding would decide which key is the largest.
SCALE, T5_SCALE = 0.15, 0.07
# By name: the class, and the settings of its config.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": (
        "BertForMaskedLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": INNER,
            "max_position_embeddings": LENGTH,
        },
    ),
    "GPT-2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": INNER,
            "n_positions": LENGTH,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "T5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "d_kv": WIDTH // HEADS,
            "d_ff": INNER,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "decoder_start_token_id": 0,
        },
    ),
    "ViT": (
        "ViTForImageClassification",
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": INNER,
            "image_size": 48,
            "patch_size": 4,
            "num_labels": 5,
        },
    ),
    "Llama": (
        "LlamaForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 2,
            "intermediate_size": INNER,
            "max_position_embeddings": LENGTH,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}


def model(name: str, settings: dict[str, Any]) -> Any:
    """Returns a model with random weights; scales of norms are around 1."""
    kind = getattr(transformers, name)
    made = kind(kind.config_class(**settings)).eval()
    scale = T5_SCALE if name.startswith("T5") else SCALE
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            drawn = scale * torch.randn_like(parameter)
            norm = any(word in key.lower() for word in ("norm", ".ln_"))
            parameter.copy_(1 + drawn if norm and key.endswith("weight") else drawn)
    return made


def inputs(name: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns a batch of a model in MODELS; its texts are padded on the right."""
    if name == "ViT":
        return {"pixel_values": rng.standard_normal((ROWS, 3, 48, 48), np.float32)}
    ends = np.array([LENGTH, LENGTH - 33, LENGTH // 2])
    arrays = {
        "input_ids": rng.integers(3, VOCABULARY, (ROWS, LENGTH)),
        "attention_mask": (np.arange(LENGTH)[None] < ends[:, None]).astype(np.int64),
    }
    if name == "T5":
        arrays["decoder_input_ids"] = rng.integers(3, VOCABULARY, (ROWS, TARGET))
    return arrays


def main(folder: Path) -> None:
    """Writes all models of MODELS."""
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    rng = np.random.default_rng(0)
    for name, (kind, settings) in MODELS.items():
        made, arrays = model(kind, settings), inputs(name, rng)
        made.save_pretrained(folder / name)
        np.savez(folder / name / "inputs.npz", allow_pickle=False, **arrays)
        found = {"float32": logits(made, arrays), "bfloat16": logits(made.bfloat16(), arrays)}
        np.savez(folder / name / "outputs.npz", allow_pickle=False, **found)


def logits(made: Any, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Returns a model's output, in its own type of numbers, as fp32."""
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    if "pixel_values" in tensors:
        tensors["pixel_values"] = tensors["pixel_values"].to(made.dtype)
    with torch.no_grad():
        found: np.ndarray = made(**tensors).logits.float().numpy()
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
