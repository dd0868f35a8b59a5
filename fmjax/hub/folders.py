"""Reads and writes Hugging Face model folders, `config.json` and `model.safetensors`, by a family's
`Reference`."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fmjax import pytree
from fmjax.config import is_run
from fmjax.config.json_files import read_json, write_json
from fmjax.contracts import Config, PyTree
from fmjax.errors import UserError
from fmjax.hub import rules
from fmjax.hub.reference import Reference
from fmjax.hub.rules import Binding, Shape, bind
from fmjax.hub.tensors import INDEX, WEIGHTS, Tensor, check_finite, finite, open_tensors

CONFIG = "config.json"
TYPES = (
    "model_type",
    "_class_name",
)  # the keys that identify the kind of a config, in transformers and in diffusers

# Parts of a model that may be missing from a file (they are newly initialized), or present but
# unused.
HEADS = ("head/", "encoder/pooler/")
# Name endings of buffers in older files, which a model computes itself.
BUFFERS = (
    *("embeddings.position_ids", "embeddings.token_type_ids"),
    *("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"),
    *(".attn.masked_bias", "encoder.version", "decoder.version"),  # from GPT-2 and from fairseq
)
# Other files of a model, besides its weights and config, that a loader would use.
BESIDE = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.*", "merges.txt", "*.model", "*.spm", "*.tiktoken"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
    "processors",
)


def model_type(config: Config) -> str | None:
    """Returns the model type of a Hugging Face config, such as "bert", or None."""
    return next((config[key] for key in TYPES if isinstance(config.get(key), str)), None)


def read_config(folder: str | Path) -> Config:
    """Returns the reference's `config.json`.

    Raises UserError if there is none, or it has no `model_type`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; models are read from local folders, so download it first"
        )
    if is_run(folder):
        raise UserError(
            f"{folder}: is a run directory, not a Hugging Face folder; "
            "export it with scripts/convert.py"
        )
    config = read_json(folder / CONFIG)
    if model_type(config) is None:
        raise UserError(
            f'{folder / CONFIG}: has no "model_type", so its kind is unknown; '
            f'add it, as in {{"model_type": "bert"}}'
        )
    return config


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Parameters read from a folder: nested dictionaries of fp32 arrays."""

    params: PyTree  # the model's
    others: PyTree  # unused heads and pooler in the folder
    fresh: tuple[str, ...]  # our names that are missing from the folder
    unused: tuple[str, ...]  # the folder's names of heads that are unknown to the family


def read_weights(folder: str | Path, reference: Reference, abstract: PyTree) -> Loaded:
    """Returns the parameters in a folder for a model with the given abstract parameters.

    Raises UserError like `open_tensors` and `fit_weights`.
    """
    return fit_weights(Path(folder), open_tensors(Path(folder)), reference, abstract)


def fit_weights(
    origin: Path, stored: Mapping[str, Tensor], reference: Reference, abstract: PyTree
) -> Loaded:
    """Returns the parameters of a model from tensors of the reference.

    Tensors are read one by one, whatever their floating-point type. Raises UserError, listing all
    missing, unexpected or misshapen tensors; only whole heads and the pooler may be missing or
    unused.
    """
    tensors = canonical(finite(origin, stored), reference)
    ours: dict[str, Shape] = {
        name: tuple(leaf.shape) for name, leaf in pytree.names(abstract).items()
    }
    drop_copies(origin, reference, tensors, ours)
    bindings = bind(reference.weights, ours, tensors)
    held = {part(name) for one in bindings for name in one.rule.params if is_held(one, tensors)}
    fresh = tuple(name for name in ours if name.startswith(HEADS) and part(name) not in held)
    wanted = [one for one in bindings if not set(fresh) & set(one.rule.params)]
    read = {name for one in wanted for name in one.names}
    spare = spare_heads(reference, ours, tensors, read)
    left = set(tensors) - read - {name for name, _ in spare.values()}
    unused = {name for name in left if module(name) not in set(map(module, read))}

    unnamed = set(ours) - set(fresh) - {name for one in wanted for name in one.rule.params}
    problems = rules.faults(wanted, tensors)
    problems["missing"] += [name for name in ours if name in unnamed]
    problems["unexpected"] = sorted(left - unused)
    check_names(origin, problems)
    others = {name: read_alone(rule, tensors[their]) for name, (their, rule) in spare.items()}
    params = rules.read(wanted, tensors, ours)
    return Loaded(pytree.unnames(params), pytree.unnames(others), fresh, tuple(sorted(unused)))


def part(name: str) -> str:
    """Returns the head or the part of the body that one of our parameters belongs to: its first two
    names."""
    return "/".join(name.split("/")[:2])


def module(name: str) -> str:
    """Returns the outermost module in a name of the reference."""
    return name.partition(".")[0]


def is_held(binding: Binding, tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether a file has any tensor that a rule reads, or need not have it."""
    return binding.rule.zeros or any(name in tensors for name in binding.names)


def canonical(tensors: Mapping[str, Tensor], reference: Reference) -> dict[str, Tensor]:
    """Returns the tensors that are parameters, without buffers; those of a bare body get the
    prefix.

    Raises UserError if a buffer differs from what the family computes.
    """
    bare = not any(name.startswith(reference.prefix) for name in tensors)
    named = {}
    for name, tensor in tensors.items():
        ending = next((ending for ending in reference.buffers if name.endswith(ending)), None)
        if ending is not None:
            reference.buffers[ending](name, tensor)
        elif not name.endswith(BUFFERS):
            named[reference.prefix + name if bare else name] = tensor
    return named


def drop_copies(
    origin: Path, reference: Reference, tensors: dict[str, Tensor], ours: Mapping[str, Shape]
) -> None:
    """Removes copies of shared weights, or uses a copy if the weight itself is not stored.

    Raises UserError if a copy differs, since the weights are then not shared.
    """
    bindings = bind(reference.weights, ours, tensors)
    claimed = {name for one in bindings for name in one.names}
    stored = {name: one.names[0] for one in bindings for name in one.rule.params}
    # Weights that the model lacks, such as a head, may be kept for another one.
    absent = {name: rule.spellings[0] for rule in reference.weights for name in rule.params}
    for copy, of in reference.tied.items():
        if copy not in tensors or copy in claimed:
            continue
        names = (of,) if isinstance(of, str) else of
        name = next((name for name in names if name in ours), names[-1])
        their = stored.get(name, absent[name])
        tensor = tensors.pop(copy)
        if their in tensors and not np.array_equal(tensor.read(), tensors[their].read()):
            raise UserError(
                f"{origin}: {copy} differs from {their}; "
                "only decoders that share the embedding are supported; use another model"
            )
        tensors.setdefault(their, tensor)


def spare_heads(
    reference: Reference, ours: Mapping[str, Shape], tensors: Mapping[str, Tensor], read: set[str]
) -> dict[str, tuple[str, rules.Rule]]:
    """Returns the name and rule of head parameters that a file has and the model lacks.

    In the reference, classifiers of several kinds share one name, so their kind is unknown, and
    they are left out.
    """
    spare = {
        rule.params[0]: (name, rule)
        for rule in reference.weights
        for name in rule.spellings
        if len(rule.params) == 1 and rule.params[0].startswith(HEADS) and rule.params[0] not in ours
        if name in tensors and name not in read
    }
    claims = collections.Counter(name for name, _ in spare.values())
    return {ours: (name, rule) for ours, (name, rule) in spare.items() if claims[name] == 1}


def read_alone(rule: rules.Rule, tensor: Tensor) -> np.ndarray:
    """Returns a parameter that the model lacks, with as few axes as possible."""
    return rule.operation.read(tensor.read(), rule.operation.simplest(tensor.shape))[0]


def check_names(origin: Path, problems: Mapping[str, list[str]]) -> None:
    """Raises one UserError that lists all missing, unexpected or misshapen tensors, if there are
    any."""
    if any(problems.values()):
        listed = pytree.grouped(
            {name: problems[name] for name in ("missing", "unexpected", "misshapen")}
        )
        raise UserError(
            f"{origin}: the weights do not fit config.json; {listed}; download both from one place"
        )


def nothing_beside(folder: Path) -> None:
    """Writes nothing."""


def write_folder(
    folder: str | Path,
    reference: Reference,
    config: Config,
    params: PyTree,
    save_beside: Callable[[Path], None] = nothing_beside,
) -> None:
    """Writes a folder that the reference loads: config, weights, and the files that `save_beside`
    writes into its argument.

    Raises UserError if the folder contains anything but a Hugging Face model, or files of a model
    that this one would not replace; or if a parameter has NaN or infinity, or no counterpart.
    """
    folder = Path(folder)
    check_target(folder)
    arrays = {name: np.asarray(leaf, np.float32) for name, leaf in pytree.names(params).items()}
    for name, array in arrays.items():
        check_finite(folder, name, array, "these weights are unusable; use an earlier checkpoint")
    bindings = bind(reference.weights, {name: array.shape for name, array in arrays.items()})
    covered = {name for one in bindings for name in one.rule.params}
    if foreign := [name for name in arrays if name not in covered]:
        raise UserError(
            f"{folder}: {foreign[0]} has no counterpart in Hugging Face's {model_type(config)}, so "
            "it cannot be exported; keep it as a run"
        )
    tensors = rules.write(bindings, arrays)
    # A head may have no parameters of its own, such as a tied language-model head.
    if set(reference.architectures[reference.architecture(config)]) <= {"pooled"}:
        tensors = {name.removeprefix(reference.prefix): value for name, value in tensors.items()}
    try:
        with staged(folder) as staging:
            save_beside(staging)
            save_weights(staging / WEIGHTS, tensors)
            write_json(staging / CONFIG, config, indent=2, sort_keys=True)
    except (
        OSError,
        SafetensorError,
        ValueError,
    ) as error:  # the last for numbers that JSON cannot represent
        raise UserError(
            f"{folder}: cannot be written ({error}); name another folder or free disk space"
        ) from None


def save_weights(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file with the permissions of other new files."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})  # readable only by its owner
    path.chmod(mode)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yields a folder to write to. Its files move to `folder` when the block succeeds.

    Raises UserError if `folder` would then still have files of another model.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as temporary:
            yield Path(temporary)
            paths = [path for path in Path(temporary).rglob("*") if path.is_file()]
            names = [path.relative_to(temporary) for path in paths]
            check_leftovers(folder, names)
            for name in sorted(names, key=lambda name: (name.name == CONFIG, name)):  # config last
                (folder / name).parent.mkdir(exist_ok=True)
                os.replace(Path(temporary) / name, folder / name)
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def check_leftovers(folder: Path, written: Sequence[Path]) -> None:
    """Raises UserError if other files of a model would remain in a folder beside the written
    ones."""
    found = {path for pattern in BESIDE for path in folder.glob(pattern)}
    files = {inner for path in found for inner in (path.rglob("*") if path.is_dir() else [path])}
    names = {path.relative_to(folder) for path in files if path.is_file()}
    if left := sorted(names - set(written)):
        raise UserError(
            f"{folder}: holds another model's {left[0]}, which would be loaded with this model; "
            "name another folder"
        )


def check_target(folder: Path) -> None:
    """Raises UserError if the target folder contains anything but a Hugging Face model in one
    file."""
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{folder}: is a file, not a folder; name another")
        return
    found = sorted(path.name for path in folder.iterdir())
    if is_run(folder):
        raise UserError(
            f"{folder}: is a run directory, which a model folder would overwrite; name another "
            "folder"
        )
    try:
        model = not found or model_type(read_json(folder / CONFIG)) is not None
    except UserError:
        model = False
    if not model:
        raise UserError(
            f"{folder}: is not empty ({', '.join(found[:3])}) and is not a Hugging Face model; "
            "name another folder"
        )
    if INDEX in found:
        raise UserError(
            f"{folder}: contains {INDEX}, whose weights would lie beside the new ones; name "
            "another folder"
        )
