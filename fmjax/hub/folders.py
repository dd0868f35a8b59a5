"""Reads and writes Hugging Face model folders: `config.json` and `model.safetensors`, by a family's tables.

A family (a module of `fmjax.models`) declares `PREFIX`, `ARCHITECTURES`, `WEIGHTS` and `TIED`; see `models/bert.py`. In
the files, kernels are stored transposed and layer by layer; here they keep their full rank and are stacked. A family whose
files differ from that has functions `unpack` and `pack`, from the file's tensors to such ones and back; see `models/gpt.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fmjax import pytree
from fmjax.config import is_run
from fmjax.config.json_files import read_json, write_json
from fmjax.errors import UserError, nearest
from fmjax.hub.tensors import INDEX, WEIGHTS, Tensor, open_tensors
from fmjax.layers.mlp import ACTIVATIONS

CONFIG = "config.json"

# Kinds of heads with a number of classes.
CLASSED = ("classify", "classify_distilled", "tag")

# Parts of a model that may be missing from a file (they start fresh), or be there without use.
HEADS = ("head/", "encoder/pooler/")

# Keys of config.json that do not change what an encoder computes: bookkeeping, names, and settings of text generation.
NEUTRAL = (
    *("_attn_implementation_autoset", "_commit_hash", "_name_or_path", "_num_labels", "architectures", "attn_implementation"),
    *("bos_token_id", "chunk_size_feed_forward", "cls_token_id", "dtype", "eos_token_id", "eos_token_ids", "finetuning_task"),
    *("gradient_checkpointing", "id2label", "label2id", "language", "mask_token_id", "model_type", "name_or_path", "num_labels"),
    *("output_attentions", "output_hidden_states", "output_past", "pad_token_id", "problem_type", "return_dict"),
    *("sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version"),
    *("unk_token_id", "use_cache"),
    *("do_sample", "early_stopping", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beams"),
    *("num_return_sequences", "repetition_penalty", "temperature", "top_k", "top_p", "renormalize_logits"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"),
)


def read_config(folder: str | Path) -> dict[str, Any]:
    """Returns the reference's `config.json`. Raises UserError if there is none, or it does not name a `model_type`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; models are read from local folders, so download it first")
    if is_run(folder):
        raise UserError(f"{folder}: is a run directory, not a Hugging Face folder; export it with scripts/convert.py")
    config = read_json(folder / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise UserError(f'{folder / CONFIG}: has no "model_type", so the model is not known; add it, as {{"model_type": "bert"}}')
    return config


def read_settings(
    config: Mapping[str, Any], table: Mapping[str, tuple[str, Any]], fixed: Mapping[str, Any], unread: Iterable[str]
) -> dict[str, Any]:
    """Returns our settings for a reference config: `table` says which key is which, with the reference's default.

    Raises UserError naming every key whose value is not the one in `fixed`, and every unknown key that is set to
    something: it may change what the model computes. `unread` and NEUTRAL are known not to. An activation has to be known.
    """
    known = {*table, *fixed, *unread, *NEUTRAL}
    refused = [f"{key}={json.dumps(value)}" for key, value in config.items() if key not in known and value]
    refused += [
        f"{key}={json.dumps(config[key])} (only {json.dumps(value)} is)"
        for key, value in fixed.items()
        if config.get(key) not in (None, value)
    ]
    if refused:
        raise UserError(f"config.json: not handled: {', '.join(refused)}; use another model, or remove what has no effect")
    settings = {}
    for key, (name, default) in table.items():
        value = settings[name] = config.get(key, default)
        if not fits(value, default):
            raise UserError(f"config.json: {key}={json.dumps(value)} is not a value like {json.dumps(default)}; correct it")
        if name.endswith("activation") and value not in ACTIVATIONS:
            choices = f"{nearest(value, ACTIVATIONS)}; those that are: {', '.join(ACTIVATIONS)}"
            raise UserError(f'config.json: {key}="{value}" is not handled{choices}')
    return settings


def fits(value: Any, default: Any) -> bool:
    """Returns whether a value is of its default's kind; counts are positive, other numbers not negative."""
    if default is None:
        return value is None or fits(value, 0.0)
    if isinstance(default, float):
        return type(value) in (int, float) and value >= 0
    return type(value) is type(default) and (type(value) is not int or value >= 1)


def write_settings(settings: Any, table: Mapping[str, tuple[str, Any]], constants: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the reference's config for our settings (a dataclass).

    Raises UserError for a setting that the reference has with the value in `constants` alone.
    """
    for name, value in constants.items():
        if getattr(settings, name) != value:
            raise UserError(
                f"model.{name}={getattr(settings, name)} has no counterpart in Hugging Face, where it is {value}; "
                f"train with model.{name}={value}"
            )
    return {key: getattr(settings, name) for key, (name, _) in table.items()}


def class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of a classifier's classes, in order. Raises UserError if `id2label` does not number them from 0."""
    names = config.get("id2label")
    if names is None:
        return tuple(f"LABEL_{index}" for index in range(config.get("num_labels") or 2))
    if not isinstance(names, dict) or set(names) != set(map(str, range(len(names)))):
        raise UserError(f'config.json: id2label={json.dumps(names)} does not number the classes "0", "1", ...; correct it')
    return tuple(str(names[str(index)]) for index in range(len(names)))


def architecture(family: ModuleType, config: Mapping[str, Any]) -> str:
    """Returns the reference's class, the bare model if none is named. Raises UserError if it is not handled."""
    known = family.ARCHITECTURES
    name = (config.get("architectures") or list(known))[0]
    if name not in known:
        raise UserError(
            f'config.json: architecture "{name}" is not handled{nearest(name, known)}; those that are: {", ".join(known)}'
        )
    return name


def heads(family: ModuleType, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the heads of a reference config's architecture, with their numbers."""
    kinds = family.ARCHITECTURES[architecture(family, config)]
    return {kind: {"classes": len(class_names(config))} if kind in CLASSED else {} for kind in kinds}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Parameters read from a folder: nested dictionaries of fp32 arrays."""

    params: dict[str, Any]  # the model's
    others: dict[str, Any]  # heads and pooler that the folder holds besides
    fresh: tuple[str, ...]  # our names that the folder does not hold
    unused: tuple[str, ...]  # the folder's names of heads that the family does not know


def read_weights(folder: str | Path, family: ModuleType, abstract: Any) -> Loaded:
    """Returns the parameters that a folder holds for a model whose abstract parameters are given.

    Tensors are read one by one, whatever their floating-point type. Raises UserError listing all that is missing,
    unexpected or misshapen; only whole heads and the pooler may be missing, or be left over.
    """
    folder = Path(folder)
    tensors = canonical(open_tensors(folder), family.PREFIX)
    if hasattr(family, "unpack"):
        tensors = family.unpack(tensors)
    ours = {name: tuple(leaf.shape) for name, leaf in pytree.names(abstract).items()}
    drop_copies(folder, family, tensors, ours)
    theirs = {name: reference_names(family.WEIGHTS[name], ours[name]) for name in ours if name in family.WEIGHTS}
    held = {part(name) for name in theirs if any(their in tensors for their in theirs[name])}
    fresh = [name for name in ours if name.startswith(HEADS) and part(name) not in held]
    wanted = {name: theirs.get(name, [name]) for name in ours if name not in fresh}
    read = {their for names in wanted.values() for their in names}
    spare = {
        name: their
        for name, their in family.WEIGHTS.items()
        if name.startswith(HEADS) and name not in ours and their in tensors and their not in read
    }
    # The reference gives classifiers of several kinds one name: whose they are is not known.
    claims = collections.Counter(spare.values())
    spare = {name: their for name, their in spare.items() if claims[their] == 1}
    left = set(tensors) - read - set(spare.values())
    known = {module(their) for names in wanted.values() for their in names}
    unused = {their for their in left if module(their) not in known}
    check_names(folder, tensors, wanted, ours, left - unused)

    params = {name: gather([tensors[their] for their in wanted[name]], name, ours) for name in wanted}
    others = {}
    for name, their in spare.items():
        array = tensors[their].read()
        others[name] = array.T if name.endswith("/kernel") else array
    return Loaded(pytree.unnames(params), pytree.unnames(others), tuple(fresh), tuple(sorted(unused)))


def part(name: str) -> str:
    """Returns the head or the part of the body that a parameter of ours belongs to: its first two names."""
    return "/".join(name.split("/")[:2])


def module(name: str) -> str:
    """Returns the outermost module of a reference's name."""
    return name.partition(".")[0]


def canonical(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns tensors by their present names: old names of norms changed, buffers left out, a bare body under `prefix`."""
    bare = not any(name.startswith(prefix) for name in tensors)
    named = {}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if not name.endswith("embeddings.position_ids"):
            named[prefix + name if bare else name] = tensor
    return named


def drop_copies(folder: Path, family: ModuleType, tensors: dict[str, Tensor], ours: Iterable[str]) -> None:
    """Takes out the copies of weights that are shared, or puts a copy where the weight itself is not stored.

    Raises UserError if a copy differs: the weights are not shared.
    """
    own = {family.WEIGHTS.get(name) for name in ours}
    for copy, name in family.TIED.items():
        their = family.WEIGHTS[name]
        if copy not in tensors or copy in own:
            continue
        tensor = tensors.pop(copy)
        if their in tensors and not np.array_equal(tensor.read(), tensors[their].read()):
            raise UserError(f"{folder}: {copy} differs from {their}; only decoders that share the embedding are handled")
        tensors.setdefault(their, tensor)


def reference_names(template: str, shape: tuple[int, ...]) -> list[str]:
    """Returns the reference's names of one parameter of ours: of each layer, where it is stacked."""
    return [template.format(layer=layer) for layer in range(shape[0])] if "{layer}" in template else [template]


def reference_shape(name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the shape in which the reference stores (a layer of) a parameter of ours: kernels [out, in], biases flat."""
    layers = int(stacked(name))
    shape = shapes[name][layers:]
    if name.endswith("/bias"):
        return (math.prod(shape),)
    if not name.endswith("/kernel"):
        return shape
    # A kernel's last axes are those of its bias. Without one, it maps one axis to all others, or heads to one axis.
    bias = shapes.get(name.removesuffix("kernel") + "bias")
    made = len(bias) - layers if bias is not None else 1 if name.endswith("/out/kernel") else len(shape) - 1
    return (math.prod(shape[-made:]), math.prod(shape[:-made]))


def check_names(
    folder: Path,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, list[str]],
    ours: Mapping[str, tuple[int, ...]],
    unexpected: Iterable[str],
) -> None:
    """Raises one UserError listing what is missing, unexpected or misshapen."""
    missing, misshapen = [], []
    for name, theirs in wanted.items():
        shape = reference_shape(name, ours)
        missing += [their for their in theirs if their not in tensors]
        misshapen += [
            f"{their} ours {shape} theirs {tensors[their].shape}"
            for their in theirs
            if their in tensors and tensors[their].shape != shape
        ]
    problems = {"missing": missing, "unexpected": sorted(unexpected), "misshapen": misshapen}
    if any(problems.values()):
        raise UserError(f"{folder}: the weights do not fit config.json; {pytree.grouped(problems)}; get both from one place")


def stacked(name: str) -> bool:
    """Returns whether a parameter of ours is stacked over layers."""
    return "/layers/" in name


def gather(tensors: list[Tensor], name: str, ours: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    """Returns a parameter of ours, fp32, from the reference's tensors: one, or one for each layer."""
    array = np.empty(ours[name], np.float32)
    for tensor, layer in zip(tensors, array if stacked(name) else [array], strict=True):
        value = tensor.read()
        layer[...] = (value.T if name.endswith("/kernel") else value).reshape(layer.shape)
    return array


def scatter(name: str, array: np.ndarray, family: ModuleType, ours: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Returns the reference's tensors of a parameter of ours: the inverse of `gather`."""
    names = reference_names(family.WEIGHTS[name], array.shape)
    shape = reference_shape(name, ours)
    tensors = {}
    for their, layer in zip(names, array if stacked(name) else [array], strict=True):
        value = layer.reshape(shape[::-1]).T if name.endswith("/kernel") else layer.reshape(shape)
        tensors[their] = np.ascontiguousarray(value)
    return tensors


def write_folder(folder: str | Path, family: ModuleType, config: Mapping[str, Any], params: Any, tokenizer: Any = None) -> None:
    """Writes a model folder that the reference loads: `config.json`, `model.safetensors`, and the tokenizer's files.

    Raises UserError if the folder holds anything but a Hugging Face model, or a parameter has no counterpart there.
    """
    folder = Path(folder)
    check_target(folder)
    arrays = {name: np.asarray(leaf, np.float32) for name, leaf in pytree.names(params).items()}
    if foreign := [name for name in arrays if name not in family.WEIGHTS]:
        raise UserError(f"{folder}: {foreign[0]} has no counterpart in Hugging Face's {config['model_type']}; keep it as a run")
    shapes = {name: array.shape for name, array in arrays.items()}
    tensors = {their: value for name, array in arrays.items() for their, value in scatter(name, array, family, shapes).items()}
    # A head may have no parameters of its own: a language model's that is tied.
    if set(family.ARCHITECTURES[architecture(family, config)]) <= {"pooled"}:
        tensors = {name.removeprefix(family.PREFIX): value for name, value in tensors.items()}
    if hasattr(family, "pack"):
        tensors = family.pack(tensors)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            tokenizer.save(folder)
        save_file(tensors, folder / f"{WEIGHTS}.new", metadata={"format": "pt"})
        os.replace(folder / f"{WEIGHTS}.new", folder / WEIGHTS)
        write_json(folder / CONFIG, dict(config), indent=2, sort_keys=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written ({error}); name another folder or make room") from None


def check_target(folder: Path) -> None:
    """Raises UserError if a folder to be written to holds anything but a Hugging Face model in one file."""
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{folder}: is a file, not a folder; name another")
        return
    found = sorted(path.name for path in folder.iterdir())
    if is_run(folder):
        raise UserError(f"{folder}: is a run directory, which a model folder would overwrite; name another")
    try:
        model = not found or "model_type" in read_json(folder / CONFIG)
    except UserError:
        model = False
    if not model:
        raise UserError(f"{folder}: is not empty ({', '.join(found[:3])}) and holds no Hugging Face model; name another")
    if INDEX in found:
        raise UserError(f"{folder}: holds {INDEX}, whose weights would stand beside the new ones; name another")
