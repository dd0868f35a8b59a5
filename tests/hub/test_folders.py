"""Hugging Face folders: layouts that are read, faults that are named, and writing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmjax import models, pytree
from fmjax.errors import UserError
from fmjax.hub import families, folders
from fmjax.hub.reference import class_names
from fmjax.inference.pretrained import abstract_params

GOLDEN = Path(__file__).parents[1] / "golden"
MLM_NSP = {"mlm": {}, "nsp": {}}
BERT = families.table_of("bert")
ABSTRACT: dict = {}  # by config and heads, to trace each model once


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of a BERT with both pretraining heads."""
    return shutil.copytree(GOLDEN / "bert_pretraining", tmp_path / "model")


def abstract(folder: Path, heads=MLM_NSP):
    config = folders.read_config(folder)
    name, reference = families.reference_of(config["model_type"])
    key = json.dumps([config, heads])
    if key not in ABSTRACT:
        ABSTRACT[key] = abstract_params(models.family(name).build(heads=heads, **reference.read_settings(config)))
    return reference, ABSTRACT[key]


def read(folder: Path, heads=MLM_NSP) -> folders.Loaded:
    return folders.read_weights(folder, *abstract(folder, heads))


def edit(folder: Path, change) -> None:
    """Rewrites the weights with a function of the dictionary of tensors."""
    tensors = load_file(folder / folders.WEIGHTS)
    save_file(change(tensors), folder / folders.WEIGHTS, metadata={"format": "pt"})


def same(one, other) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_weights_are_transposed_and_stacked(folder):
    loaded = read(folder)
    stored = load_file(folder / folders.WEIGHTS)
    flat = pytree.names(loaded.params)
    assert (loaded.fresh, loaded.others, loaded.unused) == ((), {}, ())
    assert all(leaf.dtype == np.float32 for leaf in flat.values())
    query = stored["bert.encoder.layer.1.attention.self.query.weight"]
    np.testing.assert_array_equal(flat["encoder/layers/attention/query/kernel"][1], query.T.reshape(36, 3, 12))
    out = stored["bert.encoder.layer.0.attention.output.dense.weight"]
    np.testing.assert_array_equal(flat["encoder/layers/attention/out/kernel"][0], out.T.reshape(3, 12, 36))
    np.testing.assert_array_equal(flat["embed/word/embedding"], stored["bert.embeddings.word_embeddings.weight"])


def old_names(tensors):
    def old(name):
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    return {old(name): tensor for name, tensor in tensors.items()}


def copies(tensors):
    return tensors | {
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].copy(),
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].copy(),
        "bert.embeddings.position_ids": np.arange(130)[None],
    }


def copies_alone(tensors):
    tensors = copies(tensors)
    del tensors["cls.predictions.bias"]
    return tensors


@pytest.mark.parametrize("change", [old_names, copies, copies_alone])
def test_old_layouts(folder, change):
    before = read(folder)
    edit(folder, change)
    assert same(read(folder).params, before.params)


def test_bare_body(folder):
    before = read(folder, {"pooled": {}})
    edit(folder, lambda tensors: {name.removeprefix("bert."): x for name, x in tensors.items() if name.startswith("bert.")})
    assert same(read(folder, {"pooled": {}}).params, before.params)
    assert read(folder).fresh == tuple(name for name in pytree.names(abstract(folder)[1]) if name.startswith("head/"))


def shard(folder: Path) -> dict[str, str]:
    """Splits the weights in two; returns the map of the index."""
    tensors = load_file(folder / folders.WEIGHTS)
    names = sorted(tensors)
    where = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / folders.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / folders.WEIGHTS).unlink()
    return where


def test_shards(folder):
    before = read(folder)
    shard(folder)
    assert same(read(folder).params, before.params)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_types_become_fp32(folder, dtype):
    before = read(folder)
    edit(folder, lambda tensors: {name: x.astype(dtype) for name, x in tensors.items()})
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), before.params)
    assert same(read(folder).params, rounded)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(read(folder).params))


def test_whole_numbers_are_refused(folder):
    edit(folder, lambda tensors: tensors | {"cls.predictions.bias": np.ones(97, np.int8)})
    with pytest.raises(UserError, match=r"cls.predictions.bias: holds I8"):
        read(folder)


def test_other_head_starts_fresh(folder):
    loaded = read(folder, {"classify": {"classes": 3}})
    assert loaded.fresh == ("head/classify/bias", "head/classify/kernel")
    assert "pooler" in loaded.params["encoder"]
    ours = [rule.params[0] for rule in BERT.weights]
    spare = {name for name in ours if name.startswith(("head/mlm", "head/nsp"))}
    assert set(pytree.names(loaded.others)) == spare
    stored = load_file(folder / folders.WEIGHTS)["cls.seq_relationship.weight"]
    np.testing.assert_array_equal(loaded.others["head"]["nsp"]["kernel"], stored.T)
    assert read(folder, {"classify_mean": {"classes": 3}}).fresh == ("head/classify_mean/bias", "head/classify_mean/kernel")


def test_pooler_may_be_missing_and_unknown_heads_left_over(folder):
    other = {"foo_outputs.weight": np.ones((2, 36), np.float32)}
    edit(folder, lambda tensors: {name: x for name, x in tensors.items() if "pooler" not in name} | other)
    loaded = read(folder, {"classify": {"classes": 2}})
    assert "encoder/pooler/kernel" in loaded.fresh
    assert loaded.unused == ("foo_outputs.weight",)


def test_a_classifier_is_not_taken_for_one_of_another_kind(folder):
    shapes = {"classifier.weight": (3, 36), "classifier.bias": (3,), "qa_outputs.weight": (2, 36)}
    other = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    edit(folder, lambda tensors: tensors | other)
    assert read(folder, {"mlm": {}}).unused == ("classifier.bias", "classifier.weight")
    assert read(folder, {"mlm": {}}).others["head"]["span"]["kernel"].shape == (36, 2)
    loaded = read(folder, {"tag": {"classes": 3}})
    assert "tag" in loaded.params["head"] and not {"classify", "choice"} & set(loaded.others["head"])


def test_all_faults_in_one_error(folder):
    def change(tensors):
        del tensors["bert.embeddings.LayerNorm.weight"], tensors["cls.predictions.transform.dense.bias"]
        tensors["bert.embeddings.word_embeddings.weight"] = np.ones((96, 36), np.float32)
        tensors["bert.encoder.layer.1.output.dense.weight"] = np.ones((50, 36), np.float32)
        return tensors | {"bert.encoder.layer.2.output.dense.bias": np.ones(36, np.float32), "cls.foo": np.ones(1, np.float32)}

    edit(folder, change)
    with pytest.raises(UserError) as caught:
        read(folder)
    message = str(caught.value)
    assert "missing (2): bert.embeddings.LayerNorm.weight, cls.predictions.transform.dense.bias;" in message
    assert "unexpected (2): bert.encoder.layer.2.output.dense.bias, cls.foo;" in message
    assert "misshapen (2): " in message
    assert "bert.embeddings.word_embeddings.weight ours (97, 36) theirs (96, 36)" in message
    assert "bert.encoder.layer.1.output.dense.weight ours (36, 50) theirs (50, 36)" in message
    assert "\n" not in message


def test_an_error_lists_ten_names(folder):
    edit(folder, lambda tensors: {name: x for name, x in tensors.items() if "layer.1." not in name})
    with pytest.raises(UserError, match=r"missing \(16\): ") as caught:
        read(folder)
    assert str(caught.value).count("layer.1.") == 10


def test_half_a_head_is_missing_not_fresh(folder):
    edit(folder, lambda tensors: {name: x for name, x in tensors.items() if name != "cls.seq_relationship.bias"})
    with pytest.raises(UserError, match=r"missing \(1\): cls.seq_relationship.bias"):
        read(folder)


def test_untied_decoder_is_refused(folder):
    edit(folder, lambda tensors: copies(tensors) | {"cls.predictions.decoder.weight": np.ones((97, 36), np.float32)})
    with pytest.raises(UserError, match=r"cls.predictions.decoder.weight differs"):
        read(folder)


@pytest.mark.parametrize("keep", [0, 4, 300, -1])
def test_truncated_weights(folder, keep):
    path = folder / folders.WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model.safetensors: is damaged"):
        read(folder)


def test_faults_of_an_index(folder):
    where = shard(folder)
    index, file = folder / folders.INDEX, next(iter(where.values()))
    for content, message in (
        ("{", "is not JSON"),
        ("{}", "no weight_map"),
        (json.dumps({"weight_map": {"x": "../x.safetensors"}}), "no weight_map"),
        (json.dumps({"weight_map": where | {"x": file}}), "does not hold x"),
        (json.dumps({"weight_map": where | {"x": "gone.safetensors"}}), "gone.safetensors: no such file"),
    ):
        index.write_text(content)
        with pytest.raises(UserError, match=message):
            read(folder)


class Touch:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_pickles_are_never_opened(folder, tmp_path):
    (folder / folders.WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "opened")))
    with pytest.raises(UserError, match=r"pytorch_model.bin, a pickle.*convert it once.*weights_only=True"):
        read(folder)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(("name", "message"), [("tf_model.h5", "h5, which is not supported"), ("notes", r"has no .* \(only")])
def test_other_formats(folder, name, message):
    (folder / folders.WEIGHTS).rename(folder / name)
    with pytest.raises(UserError, match=message):
        read(folder)


def test_faults_of_a_config(folder, tmp_path):
    path = folder / folders.CONFIG
    for content, message in (
        ("{", "is not JSON"),
        ("[]", "contains a JSON list"),
        ("{}", 'has no "model_type"'),
        ('{"fmjax": {}}', "is a run directory"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            folders.read_config(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"config.json: no such file"):
        folders.read_config(folder)
    with pytest.raises(UserError, match="no such folder"):
        folders.read_config(tmp_path / "bert-base-uncased")


def test_architecture_and_classes():
    assert BERT.heads({}) == {"pooled": {}}
    name = {"architectures": ["BertForSequenceClassification"]}
    assert BERT.heads(name) == {"classify": {"classes": 2}}
    assert BERT.heads(name | {"num_labels": 5}) == {"classify": {"classes": 5}}
    assert class_names({"id2label": {"1": "b", "0": "a"}}) == ("a", "b")
    for wrong in ({"1": "a"}, ["a"], {"0": "a", "2": "b"}):
        with pytest.raises(UserError, match="id2label"):
            class_names({"id2label": wrong})
    with pytest.raises(UserError, match='"BertLMHeadModel" is not supported'):
        BERT.architecture({"architectures": ["BertLMHeadModel"]})


@pytest.mark.parametrize("case", sorted(path.parent.name for path in GOLDEN.glob("*/expected.npz")))
def test_written_files_are_those_that_were_read(case, tmp_path):
    config = folders.read_config(GOLDEN / case)
    _, reference = families.reference_of(config["model_type"])
    loaded = folders.read_weights(GOLDEN / case, *abstract(GOLDEN / case, reference.heads(config)))
    folders.write_folder(tmp_path / "new", reference, config, loaded.params)
    theirs, ours = load_file(GOLDEN / case / folders.WEIGHTS), load_file(tmp_path / "new" / folders.WEIGHTS)
    assert set(theirs) == set(ours)
    assert all(np.array_equal(theirs[name], ours[name]) and ours[name].flags.c_contiguous for name in theirs)
    assert folders.read_config(tmp_path / "new") == config


def test_a_bare_model_is_written_without_prefix(folder, tmp_path):
    loaded = read(folder, {"pooled": {}})
    folders.write_folder(tmp_path / "new", BERT, {"model_type": "bert"}, loaded.params)
    assert "embeddings.word_embeddings.weight" in load_file(tmp_path / "new" / folders.WEIGHTS)


def test_other_folders_are_never_overwritten(folder, tmp_path):
    loaded, config = read(folder), folders.read_config(folder)
    run, other, file, sharded = (tmp_path / name for name in ("run", "other", "file", "sharded"))
    run.mkdir()
    (run / folders.CONFIG).write_text('{"fmjax": {}, "model_type": "bert"}')
    other.mkdir()
    (other / "thesis.txt").write_text("")
    file.write_text("")
    shard(shutil.copytree(folder, sharded))
    for target, message in ((run, "run directory"), (other, "thesis.txt"), (file, "is a file"), (sharded, "index.json")):
        before = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
        with pytest.raises(UserError, match=message):
            folders.write_folder(target, BERT, config, loaded.params)
        assert before == (sorted(path.name for path in target.iterdir()) if target.is_dir() else [])
    folders.write_folder(folder, BERT, config, jax.tree.map(lambda x: x + 1, loaded.params))
    assert same(read(folder).params, jax.tree.map(lambda x: x + 1, loaded.params))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "expected.npz", "model.safetensors"]


def test_parameters_without_counterpart_are_refused(folder, tmp_path):
    params = read(folder).params | {"head": {"classify_mean": {"kernel": np.ones((36, 2))}}}
    with pytest.raises(UserError, match="head/classify_mean/kernel has no counterpart"):
        folders.write_folder(tmp_path / "new", BERT, folders.read_config(folder), params)
    assert not (tmp_path / "new").exists()
