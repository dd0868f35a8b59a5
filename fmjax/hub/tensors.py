"""The tensors of a model folder by the reference's names, from one file or several with an index.

Reads safetensors one tensor at a time. Also reads the msgpack files of the Flax models that Hugging
Face had until version 5: trees of arrays, whose kernels and tables get the names and axis order of
the same weights in safetensors. Pickles are never opened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import msgpack
import numpy as np
from safetensors import SafetensorError, safe_open

from fmjax.config.json_files import read_json
from fmjax.contracts import PyTree
from fmjax.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLAX, FLAX_INDEX = "flax_model.msgpack", "flax_model.msgpack.index.json"
OTHER_FORMATS = ("tf_model.h5", "model.onnx")
FLOATS = ("F64", "F32", "F16", "BF16")
FLAX_FLOATS: dict[str, PyTree] = {
    name: np.dtype(name) for name in ("float64", "float32", "float16")
}
FLAX_FLOATS["bfloat16"] = np.dtype(jnp.bfloat16)
# Flax's name of a leaf -> torch's name.
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
# The axes of a kernel by its rank: of a matrix, and of convolutions over one and two axes; all are
# [..., in, out].
ORDERS = {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1)}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is read, or computed from others, on demand."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]  # in fp32


def stored(file: PyTree, name: str) -> Tensor:
    """Returns a tensor of a safetensors file; reading it raises UserError if it is not
    floating-point."""

    def read() -> np.ndarray:
        if (dtype := file.get_slice(name).get_dtype()) not in FLOATS:
            raise UserError(
                f"{name}: holds {dtype}, not one of {', '.join(FLOATS)}; "
                "quantized weights are not supported; use full-precision weights"
            )
        array: np.ndarray = file.get_tensor(name)
        return in_fp32(array)

    return Tensor(tuple(file.get_slice(name).get_shape()), read)


def in_fp32(array: np.ndarray) -> np.ndarray:
    """Returns an array in fp32. Overflows become infinite, which `finite` detects."""
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def check_finite(origin: str | Path, name: str, array: np.ndarray, how: str) -> None:
    """Raises UserError, naming the array, if it has NaN or infinity; `how` says how to fix it."""
    # Minimum and maximum propagate NaN, and need no extra memory.
    with np.errstate(invalid="ignore"):
        if array.size and not np.isfinite((array.min(), array.max())).all():
            raise UserError(f"{origin}: {name} holds NaN or infinity; {how}")


def finite(origin: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors that raise UserError when read if they have NaN or infinity."""

    def checked(name: str, tensor: Tensor) -> Tensor:
        def read() -> np.ndarray:
            array = tensor.read()
            check_finite(origin, name, array, "download the weights again")
            return array

        return Tensor(tensor.shape, read)

    return {name: checked(name, tensor) for name, tensor in tensors.items()}


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of a folder by name, from one file or those listed in an index.

    Raises UserError if a file is missing or damaged, or the weights are in an unsupported format.
    """
    if (folder / WEIGHTS).exists():
        return open_file(folder / WEIGHTS)
    if (folder / INDEX).exists():
        return open_shards(folder / INDEX, open_file, str)
    if (folder / FLAX).exists():
        return open_flax(folder / FLAX)
    if (folder / FLAX_INDEX).exists():
        return open_shards(folder / FLAX_INDEX, open_flax, lambda name: torch_name(name.split("/")))
    raise UserError(f"{folder}: {no_weights(folder)}")


def open_shards(
    path: Path, open_one: Callable[[Path], dict[str, Tensor]], named: Callable[[str], str]
) -> dict[str, Tensor]:
    """Returns the tensors of the files that an index lists.

    `named` maps the index's names to those that `open_one` returns. Raises UserError if the index
    or a file is damaged.
    """
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in index.values()
    ):
        raise UserError(
            f"{path}: has no weight_map from tensors to files of the same folder; download the "
            "file again"
        )
    files = {name: open_one(path.parent / name) for name in sorted(set(index.values()))}
    places = {named(name): file for name, file in index.items()}
    if lost := [name for name, file in places.items() if name not in files[file]]:
        raise UserError(
            f"{path}: {places[lost[0]]} does not hold {lost[0]}; download the files again"
        )
    return {name: files[file][name] for name, file in places.items()}


def open_file(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of one file. Raises UserError if it is missing or damaged."""
    try:
        file: PyTree = safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
        raise UserError(f"{path}: {why}; download the file again") from None
    names: list[str] = file.keys()
    return {name: stored(file, name) for name in names}


def open_flax(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a msgpack file of Flax.

    Raises UserError if it is missing or damaged.
    """
    try:
        # Creates nothing longer than the file itself, and only numbers, texts, lists, maps and
        # these arrays.
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=flax_array)
        leaves = dict(flatten((), tree))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        why = (
            "no such file"
            if isinstance(error, FileNotFoundError)
            else f"is damaged ({error or type(error).__name__})"
        )
        raise UserError(f"{path}: {why}; download the file again") from None
    return {torch_name(names): ordered(names[-1], array) for names, array in leaves.items()}


def flax_array(code: int, content: bytes) -> np.ndarray:
    """Returns an array in Flax's format: its shape, the name of its type, and its bytes.

    Raises ValueError for anything else.
    """
    if code != 1:
        raise ValueError(f"it contains an object of the unknown kind {code}")
    shape, name, numbers = msgpack.unpackb(content)
    if name not in FLAX_FLOATS:
        raise ValueError(f"it holds {name}, not one of {', '.join(FLAX_FLOATS)}")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"an array has the shape {shape}")
    return np.frombuffer(numbers, FLAX_FLOATS[name]).reshape(shape)


def flatten(names: tuple[str, ...], tree: PyTree) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Yields the arrays of a tree with their paths, and joins arrays of more than a gigabyte, which
    Flax splits.

    Raises ValueError for other trees.
    """
    if names and isinstance(tree, np.ndarray):
        yield names, tree
    elif not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise ValueError(
            f"{'/'.join(names) or 'it'} is a {type(tree).__name__}, not a tree of arrays"
        )
    elif "__msgpack_chunked_array__" in tree:
        shape, chunks = (
            [part[str(index)] for index in range(len(part))]
            for part in (tree["shape"], tree["chunks"])
        )
        yield names, np.concatenate(chunks).reshape(shape)
    else:
        for name, branch in tree.items():
            yield from flatten((*names, name), branch)


def torch_name(names: Sequence[str]) -> str:
    """Returns torch's name of a leaf of Flax, such as `encoder.layer.0.output.dense.weight`."""
    return ".".join((*names[:-1], LEAVES.get(names[-1], names[-1])))


def ordered(name: str, array: np.ndarray) -> Tensor:
    """Returns a leaf of Flax with the axes that torch has."""
    axes = ORDERS.get(array.ndim) if name == "kernel" else None
    array = array if axes is None else array.transpose(axes)
    return Tensor(array.shape, lambda: in_fp32(array))


def no_weights(folder: Path) -> str:
    """Returns why a folder without safetensors cannot be read, and how to fix it."""
    found = sorted(path.name for path in folder.iterdir())
    if any(name.startswith("pytorch_model") for name in found):
        # A separate process, in which torch only reads tensors (weights_only) and copies shared
        # ones.
        return (
            "holds pytorch_model.bin, a pickle, which can run code when opened, and no "
            f"{WEIGHTS}; convert it once, after "
            "pip install torch: "
            'python -c "import glob, torch, safetensors.torch as s; w = {}; '
            "[w.update(torch.load(f, 'cpu', weights_only=True)) for f in "
            f"sorted(glob.glob('{folder}/pytorch_model*.bin'))]; "
            f"s.save_file({{k: v.clone().contiguous() for k, v in w.items()}}, "
            f"'{folder}/{WEIGHTS}', {{'format': 'pt'}})\""
        )
    if other := [name for name in found if name in OTHER_FORMATS]:
        wanted = f"download the {WEIGHTS} of this model"
        return f"holds {other[0]}, which is not supported, and no {WEIGHTS}; {wanted}"
    return f"has no {WEIGHTS} (only {', '.join(found[:5]) or 'no files'}); download the file"
