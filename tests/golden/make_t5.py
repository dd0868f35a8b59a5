"""Makes the golden folders of T5, in `t5` beside this file: see `make.py`.

    PYTHONPATH=tests python tests/golden/make_t5.py

Queries are drawn smaller by K^-1/2, as in T5's own initialisation: its scores are not scaled, and at order 0.3 they are so
large that fp32 itself is off by 1e-3 (the reference differs as much from itself in fp64).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden import make, make_seq2seq

SMALL = {
    "vocab_size": 41,
    "d_model": 18,
    "d_kv": 5,
    "num_heads": 3,
    "d_ff": 23,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "relative_attention_num_buckets": 10,
    "relative_attention_max_distance": 16,
    "layer_norm_epsilon": 1e-5,
    "decoder_start_token_id": 0,
}
GATED = SMALL | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

# Folder -> the reference's class and settings.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v1_0": ("T5ForConditionalGeneration", SMALL),
    "v1_1": ("T5ForConditionalGeneration", GATED | {"num_decoder_layers": 2}),
    "mt5": ("MT5ForConditionalGeneration", GATED | {"num_layers": 1}),
    "body": ("T5Model", SMALL | {"feed_forward_proj": "gated-silu", "num_layers": 1}),
    "encoder": ("T5EncoderModel", SMALL | {"num_layers": 1}),
}


def reference(name: str, settings: dict[str, Any], seed: int, scale: float = 0.3) -> Any:
    """Returns a model of the reference, its parameters drawn anew. The head of v1.1 and mT5 is parted from the words, as in
    their files; the reference makes no such model, but loads one."""
    model = make.reference(name, settings, seed, scale)
    if hasattr(model, "lm_head") and not settings.get("tie_word_embeddings", True):
        model.lm_head.weight = torch.nn.Parameter((scale or 1.0) * torch.randn_like(model.shared.weight))
    with torch.no_grad():
        for key, parameter in model.named_parameters() if scale else ():
            if key.endswith(".q.weight"):
                parameter.mul_(settings["d_kv"] ** -0.5)
    return model


def inputs(model: Any, rows: int, source: int, target: int, seed: int) -> dict[str, np.ndarray]:
    """Returns inputs with padding at both ends and holes; those of the decoder where there is one."""
    arrays = make_seq2seq.inputs(model, rows, source, target, seed)
    alone = type(model).__name__.endswith("EncoderModel")
    return {name: array for name, array in arrays.items() if not (alone and name.startswith("decoder_"))}


def outputs(model: Any, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the reference's outputs as numpy arrays. With the language-model head it answers no `last_hidden_state`."""
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
    model.config.use_cache = False
    with torch.no_grad():
        found = dict(model(**tensors))
    return {name: value.float().numpy() for name, value in found.items() if isinstance(value, torch.Tensor) and name != "loss"}


def main() -> None:
    """Writes all folders."""
    for seed, (case, (name, settings)) in enumerate(CASES.items()):
        folder = Path(__file__).parent / "t5" / case
        model = reference(name, settings, seed)
        model.save_pretrained(folder)
        sets = {"short": inputs(model, 3, 11, 9, seed)} | ({"long": inputs(model, 2, 40, 33, seed)} if case == "v1_0" else {})
        expected = {
            f"{label}.{key}": array for label, arrays in sets.items() for key, array in (arrays | outputs(model, arrays)).items()
        }
        np.savez_compressed(folder / "expected.npz", **expected)


if __name__ == "__main__":
    main()
