"""`preprocessor_config.json` of a Hugging Face folder: reads and writes image preprocessing as the
settings of an image task.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from fmjax.config.json_files import read_json
from fmjax.contracts import Config, Value
from fmjax.data.kinds.pixels import RESAMPLINGS
from fmjax.errors import UserError

PROCESSOR = "preprocessor_config.json"
# Settings that do not affect the result, or serve other purposes.
NEUTRAL = (
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "do_convert_rgb",
    "data_format",
    "return_tensors",
)
# Settings that are only supported with this value.
ONLY = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255}
APART = "remove the file to use .apply with images that you preprocess yourself"
READ = (
    *("default_to_square", "size", "resample", "do_center_crop", "crop_size", "do_pad", "pad_size"),
    *("do_normalize", "image_mean", "image_std", *ONLY),
)


def read(folder: Path, image_size: int, channels: int) -> Config:
    """Returns the settings of an image task for a folder whose model reads images of that size and
    channels.

    If the number of channels is unknown (0), it is the number of means in the file, or 3 for a
    single mean. Without the file the settings are those of ViT: both sides resized, and pixels from
    -1 to 1. Raises UserError, naming the setting, for an unsupported setting."""
    path = folder / PROCESSOR
    # null counts as not given.
    given = {
        key: value
        for key, value in (read_json(path) if path.exists() else {}).items()
        if value is not None
    }
    unknown = [key for key, value in given.items() if value and key not in (*NEUTRAL, *READ)]
    if unknown:
        raise UserError(
            f"{path}: {unknown[0]}={json.dumps(given[unknown[0]])} is not supported; remove it if "
            "it has no effect"
        )
    for name, only in ONLY.items():
        value = given.get(name, only)
        if not isinstance(value, int | float) or not math.isclose(value, only, rel_tol=1e-4):
            raise UserError(
                f"{path}: {name}={json.dumps(value)} is not supported, only {json.dumps(only)} is; "
                f"{APART}"
            )
    names = {int(value): name for name, value in RESAMPLINGS.items()}
    if given.get("resample", 2) not in list(names):
        raise UserError(
            f"{path}: resample={given['resample']} is not one of {', '.join(map(str, names))}; "
            "correct it"
        )
    means = given.get("image_mean")
    channels = channels or (len(means) if isinstance(means, list) else 3)
    settings = read_size(path, given, image_size) | {
        "resize": names[given.get("resample", 2)],
        "channels": channels,
    }
    if not given.get("do_normalize", True):
        return settings | {"mean": (0.0,), "std": (1.0,)}
    return settings | {
        name: numbers(path, f"image_{name}", given, channels) for name in ("mean", "std")
    }


def read_size(path: Path, given: Config, image_size: int) -> Config:
    """Returns the settings `image_size`, `resize_size` and `fit`. Raises UserError for unsupported
    sizes.
    """
    size, cropped = given.get("size", image_size), bool(given.get("do_center_crop"))
    if canvas := padded_to(given):
        return {"image_size": canvas, "resize_size": 0, "fit": "pad"}
    if given.get("do_pad"):
        raise UserError(
            f"{path}: do_pad=true is not supported with size={json.dumps(size)}; remove it if it "
            "has no effect"
        )
    if (sides := rectangle(size)) and sides[0] != sides[1] and not cropped:
        return {"image_size": sides, "resize_size": 0, "fit": "stretch"}
    if isinstance(size, int) and not given.get("default_to_square", True):
        size = {"shortest_edge": size}
    side, fit = edge(path, "size", size)
    crop = edge(path, "crop_size", given.get("crop_size", image_size))[0] if cropped else side
    if crop > side or (fit == "shortest" and not cropped):
        raise UserError(
            f"{path}: an image of size={json.dumps(size)} is smaller than the crop of {crop}; "
            f"{APART}"
        )
    return {"image_size": crop, "resize_size": side if side > crop else 0, "fit": fit}


def padded_to(given: Config) -> tuple[int, int] | None:
    """Returns the canvas (height, width) that images are padded to, if they are scaled to fit into
    it.
    """
    size, canvas = given.get("size"), rectangle(given.get("pad_size"))
    if (
        not given.get("do_pad")
        or not isinstance(size, Mapping)
        or set(size) != {"max_height", "max_width"}
    ):
        return None
    return canvas if canvas == (size["max_height"], size["max_width"]) else None


def rectangle(size: Value) -> tuple[int, int] | None:
    """Returns (height, width) of a size that has both."""
    if not isinstance(size, Mapping) or set(size) != {"height", "width"}:
        return None
    sides = (size["height"], size["width"])
    return sides if all(type(side) is int and side > 0 for side in sides) else None


def numbers(path: Path, name: str, given: Config, channels: int) -> tuple[float, ...]:
    """Returns a number for each channel, or one for all; 0.5 by default. Raises UserError if it is
    anything else.
    """
    value = given.get(name, [0.5] * channels)
    found = tuple(value) if isinstance(value, list) else (value,)
    right = len(found) in (1, channels) and all(
        type(number) in (int, float) and math.isfinite(number) for number in found
    )
    if not right or (name == "image_std" and min(found) <= 0):
        raise UserError(
            f"{path}: {name}={json.dumps(value)} does not have one number for each of {channels} "
            "channels; correct it"
        )
    return found


def edge(path: Path, name: str, size: Value) -> tuple[int, str]:
    """Returns the side length of a size, and whether it applies to both sides ("stretch") or to the
    shorter one ("shortest").
    """
    side, fit = size, "stretch"
    if (
        isinstance(size, Mapping)
        and set(size) == {"height", "width"}
        and size["height"] == size["width"]
    ):
        side = size["height"]
    elif isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        side, fit = size["shortest_edge"], "shortest"
    if type(side) is int and side > 0:
        return side, fit
    raise UserError(
        f"{path}: {name}={json.dumps(size)} is not supported, only a square or a shortest_edge; "
        f"{APART}"
    )


def write(folder: Path, settings: Config) -> None:
    """Writes the settings of an image task in the format of the reference's image processor.

    Raises UserError if they cannot be written.
    """
    size, channels = settings["image_size"], settings["channels"]
    height, width = (size, size) if isinstance(size, int) else size
    resized = (settings["resize_size"] or height, settings["resize_size"] or width)
    shortest, padded = settings["fit"] == "shortest", settings["fit"] == "pad"
    canvas = {"height": height, "width": width}
    content: Config = {
        "image_processor_type": "DetrImageProcessor" if padded else "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": resized[0], "width": resized[1]},
        "resample": int(RESAMPLINGS[settings["resize"]]),
        "do_center_crop": shortest or resized != (height, width),
        "crop_size": canvas,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(settings["mean"]) * (channels if len(settings["mean"]) == 1 else 1),
        "image_std": list(settings["std"]) * (channels if len(settings["std"]) == 1 else 1),
    }
    if shortest:
        content["size"] = {"shortest_edge": resized[0]}
    if padded:
        content |= {
            "size": {"max_height": height, "max_width": width},
            "do_pad": True,
            "pad_size": canvas,
        }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        (folder / PROCESSOR).write_text(text, encoding="utf-8")
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise UserError(
            f"{folder / PROCESSOR}: {reason}; fix its permissions or free disk space"
        ) from None
