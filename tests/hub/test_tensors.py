"""The files that Hugging Face's Flax classes left behind: their trees give the weights of safetensors; damage is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmjax import models, pytree
from fmjax.errors import UserError
from fmjax.hub import families, folders
from fmjax.hub.tensors import FLAX, FLAX_INDEX, Tensor, open_tensors
from fmjax.inference.pretrained import abstract_params

GOLDEN = Path(__file__).parents[1] / "golden"
# A model of each family for which there were Flax classes.
CASES = ("bert_pretraining", "roberta_mlm", "decoders/gpt2_lm", "decoders/llama_lm", "t5/v1_0", "t5/v1_1", "vision/vit_classify")
TABLES = ("embeddings.weight", "wte.weight", "wpe.weight", "shared.weight", "embed_tokens.weight", "attention_bias.weight")
NORMS = ("LayerNorm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight", "lm_head.layer_norm.weight", "layernorm.weight")
NORMS += ("layernorm_before.weight", "layernorm_after.weight")


def flax_tree(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the tree in which transformers 4 kept the weights of torch: kernels [..., in, out], norms' scales, embeddings."""
    leaves = {}
    for name, array in tensors.items():
        if name.endswith(NORMS):
            name = name.replace(".weight", ".scale")
        elif name.endswith(TABLES):
            name = name.replace(".weight", ".embedding")
        elif name.endswith(".weight") and array.ndim > 1:  # of matrices and convolutions; T5's and Llama's norms stay a weight
            name, array = name.replace(".weight", ".kernel"), array.transpose(*range(2, array.ndim), 1, 0)
        leaves[name.replace(".", "/")] = np.ascontiguousarray(array)
    return pytree.unnames(leaves)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return set(one) == set(other) and all(
        one[name].shape == other[name].shape and np.array_equal(one[name].read(), other[name].read()) for name in one
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    """A BERT of a Flax class."""
    return flax_folder("bert_pretraining", tmp_path / "flax")


def flax_folder(case: str, target: Path) -> Path:
    shutil.copytree(GOLDEN / case, target)
    tree = flax_tree(load_file(target / folders.WEIGHTS))
    (target / folders.WEIGHTS).unlink()
    (target / FLAX).write_bytes(flax.serialization.to_bytes(tree))
    return target


@pytest.mark.parametrize("case", CASES)
def test_trees_are_the_tensors_of_the_reference(case, tmp_path):
    found = open_tensors(flax_folder(case, tmp_path / "flax"))
    assert same(found, open_tensors(GOLDEN / case))
    assert all(tensor.read().dtype == np.float32 for tensor in found.values())


@pytest.mark.parametrize("case", ["bert_pretraining", "decoders/gpt2_lm", "t5/v1_0", "vision/vit_classify"])
def test_models_are_those_of_the_reference(case, tmp_path):
    folder = flax_folder(case, tmp_path / "flax")
    config = folders.read_config(folder)
    name, reference = families.reference_of(config["model_type"])
    model = models.family(name).build(heads=reference.heads(config), **reference.read_settings(config))
    abstract = abstract_params(model)
    ours, theirs = (pytree.names(folders.read_weights(place, reference, abstract).params) for place in (folder, GOLDEN / case))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_convolutions_and_their_axes(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"over.one.weight": rng.normal(size=(5, 3, 2)), "over.two.weight": rng.normal(size=(7, 3, 2, 4))}
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    tree = flax_tree(tensors)
    assert tree["over"]["one"]["kernel"].shape == (2, 3, 5) and tree["over"]["two"]["kernel"].shape == (2, 4, 3, 7)
    (tmp_path / FLAX).write_bytes(flax.serialization.to_bytes(tree))
    save_file(tensors, tmp_path / "other.safetensors")
    found = open_tensors(tmp_path)
    assert all(np.array_equal(found[name].read(), array) for name, array in tensors.items())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_other_types_become_fp32(tmp_path, dtype):
    array = np.linspace(-3, 3, 6).reshape(2, 3).astype(dtype)
    (tmp_path / FLAX).write_bytes(flax.serialization.to_bytes({"a": {"kernel": array}}))
    found = open_tensors(tmp_path)["a.weight"]
    assert found.shape == (3, 2) and found.read().dtype == np.float32
    np.testing.assert_array_equal(found.read(), array.astype(np.float32).T)


def test_arrays_that_were_cut_are_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 20)
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    content = flax.serialization.msgpack_serialize({"a": {"kernel": array}})
    assert b"__msgpack_chunked_array__" in content
    (tmp_path / FLAX).write_bytes(content)
    assert np.array_equal(open_tensors(tmp_path)["a.weight"].read(), array.T)


def shard(folder: Path) -> dict[str, str]:
    """Splits the tree in two; returns the map of the index, whose names are paths of the tree."""
    leaves = pytree.names(flax.serialization.msgpack_restore((folder / FLAX).read_bytes()))
    where = {name: f"flax_model-0000{1 + index % 2}-of-00002.msgpack" for index, name in enumerate(leaves)}
    for file in set(where.values()):
        part = pytree.unnames({name: leaf for name, leaf in leaves.items() if where[name] == file})
        (folder / file).write_bytes(flax.serialization.to_bytes(part))
    (folder / FLAX_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / FLAX).unlink()
    return where


def test_shards(folder):
    before = open_tensors(folder)
    where = shard(folder)
    assert same(open_tensors(folder), before)
    name = next(iter(where))
    for content, message in (
        ("{}", "no weight_map"),
        (json.dumps({"weight_map": {"x": "/etc/passwd"}}), "no weight_map"),
        (json.dumps({"weight_map": where | {"x/kernel": where[name]}}), "does not hold x.weight"),
        (json.dumps({"weight_map": where | {name: "gone.msgpack"}}), "gone.msgpack: no such file"),
    ):
        (folder / FLAX_INDEX).write_text(content)
        with pytest.raises(UserError, match=message):
            open_tensors(folder)


def test_safetensors_come_first(folder):
    shutil.copy(GOLDEN / "bert_pretraining" / folders.WEIGHTS, folder)
    (folder / FLAX).write_bytes(b"")
    assert same(open_tensors(folder), open_tensors(GOLDEN / "bert_pretraining"))


def packed(shape: Any = (2,), name: Any = "float32", numbers: Any = bytes(8), code: int = 1) -> bytes:
    return msgpack.packb({"a": {"bias": msgpack.ExtType(code, msgpack.packb((shape, name, numbers)))}})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is damaged"),
        (b"\x81", "is damaged"),
        (b"\xdf\xff\xff\xff\xff", "is damaged"),
        (b"\x91" * 100_000, "is damaged"),
        (b"\x81\xa1a" * 10_000 + b"\xc0", "is damaged"),
        (packed()[:-3], "is damaged"),
        (packed() + b"\x00", "is damaged"),
        (msgpack.packb([1, 2]), "it is a list, not a tree of arrays"),
        (msgpack.packb({"a": {"b": "text"}}), "a/b is a str, not a tree of arrays"),
        (msgpack.packb({"a": None}), "a is a NoneType"),
        (msgpack.packb({b"\x01": 1}), "is damaged"),
        (msgpack.packb({1: {}}), "is damaged"),
        (msgpack.packb(msgpack.ExtType(1, msgpack.packb(((), "float32", bytes(4))))), "it is a ndarray"),
        (packed(code=7), "an object of the unknown kind 7"),
        (packed(name="object"), "it holds object"),
        (packed(name="int32"), "it holds int32"),
        (packed(name=["float32"]), "is damaged"),
        (packed(shape=(3,)), "is damaged"),
        (packed(shape=(-1,)), r"an array has the shape \[-1\]"),
        (packed(shape=("2",)), r"an array has the shape \['2'\]"),
        (packed(shape=2), "is damaged"),
        (packed(shape=(1 << 62,)), "is damaged"),
        (packed(numbers="text"), "is damaged"),
        (packed(numbers=bytes(7)), "is damaged"),
        (msgpack.packb({"a": {"__msgpack_chunked_array__": True}}), "is damaged"),
        (msgpack.packb({"a": {"__msgpack_chunked_array__": True, "shape": 1, "chunks": []}}), "is damaged"),
        (msgpack.packb({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"0": "x"}}}), "is damaged"),
    ],
)
def test_damaged_files(tmp_path, content, why):
    (tmp_path / FLAX).write_bytes(content)
    with pytest.raises(UserError, match=why) as caught:
        open_tensors(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / FLAX}: is damaged") and message.endswith("; download the file again")
    assert "\n" not in str(caught.value)
