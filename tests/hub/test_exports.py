"""Exports come back as what they were: old and new keys, kinds of a family, files, special tokens."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmjax import models, pytree, tasks
from fmjax.data.tokenizers.tokenizer import train_tokenizer
from fmjax.errors import UserError
from fmjax.hub import families, folders
from fmjax.inference import export
from fmjax.inference.generation import with_start
from fmjax.inference.load import load

GOLDEN = Path(__file__).parents[1] / "golden"
ROTARY = ("llama", "mistral", "qwen2")
SCALINGS = {
    "default": {"rotary_base": 5e5},
    "linear": {"rotary_base": 5e5, "rotary_scaling": "linear", "rotary_factor": 2.0},
    "llama3": {"rotary_base": 5e5, "rotary_scaling": "llama3", "rotary_factor": 8.0},
}
SIZES = {"width": 12, "layers": 1, "attention_heads": 2, "mlp_width": 8, "vocab_size": 60}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("family", ROTARY)
def test_rotary_positions_are_written_by_their_old_and_new_names(family, kind):
    reference, made = families.table_of(family), models.family(family)
    own = {"qkv_bias": True} if family == "qwen2" else {}
    settings = made.build(heads={"lm": {}}, **SIZES, **own, **SCALINGS[kind]).settings
    config = reference.write_config(settings)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert (config["rope_scaling"] is None) == (kind == "default")
    # Either spelling alone says all; transformers 4 reads the old one.
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    new = {
        key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")
    }
    assert reference.read_settings(old) == reference.read_settings(new)
    assert reference.read_settings(config) == reference.read_settings(new)
    assert reference.read_settings(new)["rotary_base"] == 5e5


@pytest.mark.parametrize(
    ("rotary", "message"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor=0 must be above 0"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be above 0"),
    ],
)
def test_rotary_positions_of_zero_are_refused(rotary, message):
    with pytest.raises(UserError, match=message):
        families.table_of("llama").read_settings({"model_type": "llama", **rotary})


@pytest.fixture
def copied(tmp_path):
    """Returns a function that copies a golden folder and adds tensors to it."""

    def make(case: str, **more: np.ndarray) -> Path:
        folder = shutil.copytree(GOLDEN / case, tmp_path / Path(case).name)
        tensors = load_file(folder / folders.WEIGHTS) | more
        save_file(tensors, folder / folders.WEIGHTS, metadata={"format": "pt"})
        return folder

    return make


BUFFERS = {
    "decoders/llama_lm": (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.rotary_emb.inv_freq",
    ),
    "decoders/gpt2_lm": ("transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"),
    "bert_classify": ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids"),
    "distilbert_classify": ("distilbert.embeddings.position_ids",),
    "seq2seq/bart": ("model.encoder.version", "model.decoder.version"),
}


@pytest.mark.parametrize("case", BUFFERS)
def test_buffers_of_old_files_are_not_read(case, copied):
    # Their types and numbers do not matter.
    buffers = {name: np.full(3, 255, np.uint8) for name in BUFFERS[case]}
    folder, before = copied(case, **buffers), load(GOLDEN / case)
    assert jax.tree.all(jax.tree.map(np.array_equal, load(folder).params, before.params))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e300])
def test_weights_that_are_not_finite_are_named(number, copied):
    name = "bert.encoder.layer.1.output.dense.bias"
    folder = copied("bert_classify", **{name: np.array([0.0] * 35 + [number])})
    with pytest.raises(UserError, match=f"{name} holds NaN or infinity; download the weights again"):
        load(folder)


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    model = load(GOLDEN / "bert_classify")
    flat = pytree.names(model.params)
    flat["head/classify/bias"] = np.array([0, np.nan, 0], np.float32)
    with pytest.raises(UserError, match="head/classify/bias holds NaN or infinity"):
        dataclasses.replace(model, params=pytree.unnames(flat)).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_files_of_another_model_are_not_left_beside(tmp_path):
    model = load(GOLDEN / "bert_classify")
    for file in ("vocab.txt", "tokenizer_config.json", "preprocessor_config.json", "processors/a/b"):
        folder = tmp_path / file.replace("/", "-")
        shutil.copytree(GOLDEN / "roberta_mlm", folder)
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}")
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match=f"holds another model's {file}, which would be loaded with this model"):
            model.save(folder)
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_is_saved_again_in_its_own_folder(tmp_path):
    tokenizer = train_tokenizer(["the cat sat", "a dog ran"] * 3, "wordpiece", 60)
    folder = shutil.copytree(GOLDEN / "bert_classify", tmp_path / "model")
    tokenizer.save(folder)
    model = load(folder)
    for _ in range(2):
        model.save(folder)
    assert load(folder).tokenizer.sha256 == tokenizer.sha256
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_those_who_may_read_other_files_may_read_the_weights(tmp_path):
    before = os.umask(0o027)
    try:
        load(GOLDEN / "bert_classify").save(tmp_path / "new")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
    assert modes == {0o640}
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o750


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert"])
def test_kinds_of_one_family_come_back_as_what_they_were(kind):
    """A run keeps the kind of the weights that it started from."""
    family, reference = families.reference_of(kind)
    task = tasks.make({"name": "classify", "labels": ("a", "b")})
    model = models.family(family).build(heads=task.heads, **SIZES)
    noted = export.special_type({"model_type": kind}, family)
    assert noted == ("" if kind == "roberta" else kind)
    run = {"init": {"model_type": noted}} if noted else {}
    _, config = export.written_config(families.table_of(family), model, task, None, run)
    assert config["model_type"] == kind and reference.heads(config) == dict(task.heads)
    stem = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}[kind]
    assert config["architectures"] == [f"{stem}ForSequenceClassification"]


def test_a_kind_without_such_a_class_is_exported_as_the_family():
    _, name = families.table_of("vit").exported({"classify": {}}, "vit_mae")
    assert name == "ViTForImageClassification"
    one, name = families.table_of("t5").exported({"lm": {}}, "mt5")
    assert (one.model_types, name) == (("mt5",), "MT5ForConditionalGeneration")


def test_special_tokens_are_those_of_the_vocabulary():
    task = tasks.make({"name": "clm"})
    model = models.family("gpt").build(heads=task.heads, positions=8, **SIZES)
    for tokens, begin, end in (("bpe", "<s>", "</s>"), ("t5", "</s>", "</s>"), ("wordpiece", "[CLS]", "[SEP]")):
        tokenizer = train_tokenizer(["the cat sat", "a dog ran"] * 9, tokens, 400)
        _, config = export.written_config(
            families.table_of("gpt"), model, task, tokenizer, {"model": {"name": "gpt"}}
        )
        names = dict(enumerate(tokenizer.pieces.tokens))
        assert names.get(config["bos_token_id"]) == begin, tokens
        assert names.get(config["eos_token_id"]) == end, tokens


def test_a_family_may_begin_with_the_prompt_it_is_given():
    arrays = {"decoder_input_ids": np.array([[5, 6], [7, 8]])}
    assert with_start(arrays, 2, True)["decoder_input_ids"].tolist() == [[2, 5, 6], [2, 7, 8]]
    assert with_start(arrays, 2, False)["decoder_input_ids"].tolist() == [[5, 6], [7, 8]]
    nothing = with_start({"input_features": np.zeros((2, 3, 4))}, 2, False)
    assert nothing["decoder_input_ids"].tolist() == [[2], [2]]
    assert all(table.starts_prompts for _, table in families.known_types().values())


def test_written_configs_are_json(tmp_path):
    config = json.loads((GOLDEN / "bert_classify" / folders.CONFIG).read_text())
    loaded = load(GOLDEN / "bert_classify")
    with pytest.raises(UserError, match="new: cannot be written"):
        folders.write_folder(
            tmp_path / "new", loaded.reference, config | {"epsilon": np.nan}, loaded.params
        )
    assert not (tmp_path / "new").exists()
