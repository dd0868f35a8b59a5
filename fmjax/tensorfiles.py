"""The tensors of a model folder: safetensors files, one or several with an index, opened here and read one by one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fmjax.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OTHER_FORMATS = ("flax_model.msgpack", "tf_model.h5", "model.onnx")
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is read, or computed from others, when it is asked for."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]  # in fp32


def stored(file: Any, name: str) -> Tensor:
    """Returns a tensor of a safetensors file; reading it raises UserError if it does not hold floating-point numbers."""

    def read() -> np.ndarray:
        if (dtype := file.get_slice(name).get_dtype()) not in FLOATS:
            raise UserError(f"{name}: holds {dtype}, not one of {', '.join(FLOATS)}; quantised weights are not handled")
        return file.get_tensor(name).astype(np.float32)

    return Tensor(tuple(file.get_slice(name).get_shape()), read)


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of a folder by name, from one file or from the several that an index lists.

    Raises UserError if a file is missing or damaged, or the weights are in a format that is not read.
    """
    if (folder / WEIGHTS).exists():
        return open_file(folder / WEIGHTS)
    if not (folder / INDEX).exists():
        raise UserError(f"{folder}: {no_weights(folder)}")
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) and Path(name).name == name for name in index.values()):
        raise UserError(f"{folder / INDEX}: has no weight_map from tensors to files beside it; get the file again")
    files = {name: open_file(folder / name) for name in sorted(set(index.values()))}
    if lost := [name for name, file in index.items() if name not in files[file]]:
        raise UserError(f"{folder / INDEX}: {index[lost[0]]} does not hold {lost[0]}; get the files again")
    return {name: files[file][name] for name, file in index.items()}


def open_file(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of one file. Raises UserError if it is missing or damaged."""
    try:
        file = safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
        raise UserError(f"{path}: {why}; get the file again") from None
    return {name: stored(file, name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)


def no_weights(folder: Path) -> str:
    """Returns why a folder without safetensors cannot be read, and what to do."""
    found = sorted(path.name for path in folder.iterdir())
    if any(name.startswith("pytorch_model") for name in found):
        return (
            f"holds pytorch_model.bin, a pickle, which can run code when opened, and no {WEIGHTS}; convert it once, after "
            "pip install 'fmjax[parity]': "
            f"python -c \"import transformers as t; p='{folder}'; c=t.AutoConfig.from_pretrained(p); "
            "getattr(t, c.architectures[0]).from_pretrained(p).save_pretrained(p)\""
        )
    if other := [name for name in found if name in OTHER_FORMATS]:
        return f"holds {other[0]}, which is not read, and no {WEIGHTS}; get the {WEIGHTS} of this model"
    return f"has no {WEIGHTS} (there are {', '.join(found[:5]) or 'no files'}); get the file"


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object. Raises UserError if the file is missing or holds something else."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a Hugging Face model folder has one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not JSON ({error}); get the file again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a JSON {type(content).__name__}, not an object; get the file again")
    return content
