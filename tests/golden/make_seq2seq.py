"""Makes the golden folders of encoder-decoders, in `seq2seq` beside this file: see `make.py`.

python tests/golden/make_seq2seq.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

SMALL = {
    "vocab_size": 41,
    "d_model": 18,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 23,
    "decoder_ffn_dim": 19,
    "max_position_embeddings": 40,
}
# The quirks that opus-mt's configs have.
MARIAN = SMALL | {
    "activation_function": "swish",
    "scale_embedding": True,
    "pad_token_id": 40,
    "decoder_start_token_id": 40,
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "normalize_before": False,
    "normalize_embedding": False,
    "static_position_embeddings": True,
    "extra_pos_embeddings": 41,
}
TWO_TABLES = {
    "share_encoder_decoder_embeddings": False,
    "decoder_vocab_size": 37,
    "pad_token_id": 36,
    "decoder_start_token_id": 36,
}
MBART = SMALL | {"scale_embedding": True, "decoder_start_token_id": 5}

# Folder -> the reference's class and settings.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "marian": ("MarianMTModel", MARIAN),
    "marian_two_tables": ("MarianMTModel", MARIAN | TWO_TABLES | {"encoder_layers": 1}),
    "marian_body": ("MarianModel", MARIAN | {"encoder_layers": 1}),
    "bart": ("BartForConditionalGeneration", SMALL),
    "mbart": ("MBartForConditionalGeneration", MBART),
}


def reference(name: str, settings: dict[str, Any], seed: int, scale: float = 0.3) -> Any:
    """Returns a model of the reference in evaluation mode, its parameters and the logits' bias drawn anew; scale 0: as it
    initialises them. Sinusoids stay as they are."""
    torch.manual_seed(seed)
    model = getattr(transformers, name)
    model = model(model.config_class(**settings)).eval()
    drawn = dict(model.named_parameters()) | {key: b for key, b in model.named_buffers() if key == "final_logits_bias"}
    with torch.no_grad():
        for key, parameter in drawn.items() if scale else ():
            if not (name.startswith("Marian") and "embed_positions" in key):
                noise = scale * torch.randn_like(parameter)
                parameter.copy_(1 + noise if key.endswith("weight") and "norm" in key else noise)
    return model


def inputs(model: Any, rows: int, source: int, target: int, seed: int) -> dict[str, np.ndarray]:
    """Returns inputs with padding at the end, at the beginning, and holes in the middle, of source and target."""
    rng = np.random.default_rng(seed)
    config = model.config
    arrays = {}
    sides = (("", source, config.vocab_size), ("decoder_", target, getattr(config, "decoder_vocab_size", config.vocab_size)))
    for prefix, length, vocabulary in sides:
        mask = np.ones((rows, length), np.int64)
        mask[0, length - 3 :] = 0
        mask[1, :2] = 0
        mask[2:] = rng.random((rows - 2, length)) < 0.7
        # The reference gives a row without any key another meaning from one kernel to the next.
        mask[:, length // 2] = 1
        if prefix:
            mask[1:, 0] = 1
        arrays |= {f"{prefix}input_ids": rng.integers(0, vocabulary, (rows, length)), f"{prefix}attention_mask": mask}
    return arrays


def outputs(model: Any, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the reference's outputs, with those of its body, as numpy arrays."""
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
    with torch.no_grad():
        found = dict(model.base_model(**tensors, use_cache=False)) | dict(model(**tensors, use_cache=False))
    return {name: value.float().numpy() for name, value in found.items() if isinstance(value, torch.Tensor)}


def main() -> None:
    """Writes all folders."""
    for seed, (case, (name, settings)) in enumerate(CASES.items()):
        folder = Path(__file__).parent / "seq2seq" / case
        model = reference(name, settings, seed)
        model.save_pretrained(folder)
        arrays = inputs(model, 3, 11, 9, seed)
        np.savez_compressed(folder / "expected.npz", **arrays, **outputs(model, arrays))


if __name__ == "__main__":
    main()
