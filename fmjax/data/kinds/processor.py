"""`preprocessor_config.json` of a Hugging Face folder: how images become a model's input, as the settings of a task of images."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmjax.config.json_files import read_json
from fmjax.data.kinds.pixels import RESAMPLINGS
from fmjax.errors import UserError

PROCESSOR = "preprocessor_config.json"
# Settings that change nothing in what is computed, or are of another use.
NEUTRAL = ("image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb", "data_format", "return_tensors")
# Settings that are handled with this value alone.
ONLY = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255}
APART = "take the file away to use .apply, with images made elsewhere"
READ = ("default_to_square", "size", "resample", "do_center_crop", "crop_size", "do_normalize", "image_mean", "image_std", *ONLY)


def read_processor(folder: Path, image_size: int, channels: int) -> dict[str, Any]:
    """Returns the settings of `tasks.images.Pictures` for a folder whose model reads images of that size and channels.

    Without the file they are those of ViT: both sides resized, and pixels from -1 to 1. Raises UserError, naming the
    setting, for what is not handled.
    """
    path = folder / PROCESSOR
    # What is null is not given.
    given = {key: value for key, value in (read_json(path) if path.exists() else {}).items() if value is not None}
    unknown = [key for key, value in given.items() if value and key not in (*NEUTRAL, *READ)]
    if unknown:
        raise UserError(f"{path}: {unknown[0]}={json.dumps(given[unknown[0]])} is not handled; remove it if it has no effect")
    for name, only in ONLY.items():
        value = given.get(name, only)
        if not isinstance(value, int | float) or not math.isclose(value, only, rel_tol=1e-4):
            raise UserError(f"{path}: {name}={json.dumps(value)} is not handled, only {json.dumps(only)} is; {APART}")
    names = {int(value): name for name, value in RESAMPLINGS.items()}
    if given.get("resample", 2) not in list(names):
        raise UserError(f"{path}: resample={given['resample']} is none of {', '.join(map(str, names))}; correct it")
    size, cropped = given.get("size", image_size), bool(given.get("do_center_crop"))
    if isinstance(size, int) and not given.get("default_to_square", True):
        size = {"shortest_edge": size}
    side, fit = edge(path, "size", size)
    crop = edge(path, "crop_size", given.get("crop_size", image_size))[0] if cropped else side
    if crop > side or (fit == "shortest" and not cropped):
        raise UserError(f"{path}: an image of size={json.dumps(size)} holds no square of {crop}; {APART}")
    settings = {
        "image_size": crop,
        "resize_size": side if side > crop else 0,
        "fit": fit,
        "resize": names[given.get("resample", 2)],
        "channels": channels,
    }
    if not given.get("do_normalize", True):
        return settings | {"mean": (0.0,), "std": (1.0,)}
    return settings | {name: numbers(path, f"image_{name}", given, channels) for name in ("mean", "std")}


def numbers(path: Path, name: str, given: Mapping[str, Any], channels: int) -> tuple[float, ...]:
    """Returns a number for each channel, or one for all; 0.5 if it is not given. Raises UserError if it is anything else."""
    value = given.get(name, [0.5] * channels)
    found = tuple(value) if isinstance(value, list) else (value,)
    right = len(found) in (1, channels) and all(type(number) in (int, float) and math.isfinite(number) for number in found)
    if not right or (name == "image_std" and min(found) <= 0):
        raise UserError(f"{path}: {name}={json.dumps(value)} is not a number for each of {channels} channels; correct it")
    return found


def edge(path: Path, name: str, size: Any) -> tuple[int, str]:
    """Returns the side of a size, and whether it is of both sides ("stretch") or of the shorter one ("shortest")."""
    side, fit = size, "stretch"
    if isinstance(size, Mapping) and set(size) == {"height", "width"} and size["height"] == size["width"]:
        side = size["height"]
    elif isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        side, fit = size["shortest_edge"], "shortest"
    if type(side) is int and side > 0:
        return side, fit
    raise UserError(f"{path}: {name}={json.dumps(size)} is not handled, only a square or a shortest_edge; {APART}")


def write_processor(folder: Path, task: Any) -> None:
    """Writes the settings of a task of images as the reference's image processor reads them.

    Raises UserError if they cannot be written.
    """
    side, crop = task.resize_size or task.image_size, task.image_size
    shortest = task.fit == "shortest"
    content = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side} if shortest else {"height": side, "width": side},
        "resample": int(RESAMPLINGS[task.resize]),
        "do_center_crop": shortest or crop != side,
        "crop_size": {"height": crop, "width": crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(task.mean) * (task.channels if len(task.mean) == 1 else 1),
        "image_std": list(task.std) * (task.channels if len(task.std) == 1 else 1),
    }
    try:
        (folder / PROCESSOR).write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{folder / PROCESSOR}: cannot be written ({error.strerror}); make room") from None
