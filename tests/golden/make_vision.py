"""Makes the golden folders in `vision/`: tiny random models of images, with inputs and the reference's outputs.

    python tests/golden/make_vision.py

As `make.py` does; `own` are images of the model's size, `other` of another one, to which the reference interpolates its
positions. A masked autoencoder is given the noise that chooses its patches; `patch_keep` are the patches it keeps.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from make import LABELS, reference

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 31,
    "image_size": 20,
    "patch_size": 5,
    "num_channels": 3,
    "layer_norm_eps": 1e-5,  # at 1e-12 a wrong epsilon would not show
}
DECODER = {
    "decoder_hidden_size": 20,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 26,
    "norm_pix_loss": True,
}
GREY = {"num_channels": 1, "patch_size": 4, "qkv_bias": False, "pooler_output_size": 10, "pooler_act": "relu"}

# Folder -> the reference's class and settings.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_model": ("ViTModel", SMALL | GREY),
    "vit_classify": ("ViTForImageClassification", SMALL | LABELS),
    "deit_model": ("DeiTModel", SMALL),
    "deit_distilled": ("DeiTForImageClassificationWithTeacher", SMALL | LABELS),
    "vit_mae": ("ViTMAEForPreTraining", SMALL | DECODER),
}


def images(config: Any, rows: int, height: int, width: int, seed: int) -> np.ndarray:
    """Returns random pixel values."""
    return np.random.default_rng(seed).normal(size=(rows, config.num_channels, height, width)).astype(np.float32)


def outputs(model: Any, pixels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Returns the inputs and the reference's outputs, with the hidden states of its body where it has no own."""
    size, patch = model.config.image_size, model.config.patch_size
    height, width = pixels.shape[2:]
    arrays, more = {"pixel_values": pixels}, {}
    if "MAE" in type(model).__name__:
        count = (height // patch) * (width // patch)
        noise = np.random.default_rng(seed).random((len(pixels), count)).astype(np.float32)
        kept = int(count * (1 - model.config.mask_ratio))
        more = {"noise": torch.from_numpy(noise)}
        arrays["patch_keep"] = np.argsort(noise, axis=1)[:, :kept].astype(np.int32)
    given = {"pixel_values": torch.from_numpy(pixels), "interpolate_pos_encoding": (height, width) != (size, size), **more}
    with torch.no_grad():
        found = dict(model.base_model(**given)) | dict(model(**given))
    wanted = ("last_hidden_state", "pooler_output", "logits", "loss")
    return arrays | {name: found[name].numpy() for name in wanted if found.get(name) is not None}


def main() -> None:
    """Writes all folders."""
    for seed, (case, (name, settings)) in enumerate(CASES.items()):
        folder = Path(__file__).parent / "vision" / case
        model = reference(name, settings, seed)
        model.save_pretrained(folder)
        patch = model.config.patch_size
        sets = {"own": (3, 20, 20), "other": (2, 7 * patch, 3 * patch)}
        expected = {
            f"{part}.{key}": array
            for part, shape in sets.items()
            for key, array in outputs(model, images(model.config, *shape, seed), seed).items()
        }
        np.savez_compressed(folder / "expected.npz", **expected)


if __name__ == "__main__":
    main()
