"""`fmjax.load`: Hugging Face folders and runs, their inputs and outputs, predictions, and saving."""

from __future__ import annotations

import dataclasses
import json
import shutil
import string
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.processors import using

import fmjax
from fmjax import models, pytree, tasks
from fmjax.config import write_config
from fmjax.contracts import Processors
from fmjax.data.tokenizers.tokenizer import train_tokenizer
from fmjax.errors import UserError
from fmjax.hub import folders
from fmjax.hub.reference import class_names
from fmjax.inference import predict
from fmjax.inference.evaluate import evaluate_run
from fmjax.inference.load import load
from fmjax.inference.pretrained import Pretrained, abstract_params
from fmjax.runs.checkpoint import Best, Checkpoints
from fmjax.runs.folder import check_workdir

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES = {"width": 36, "layers": 2, "attention_heads": 3, "mlp_width": 50, "vocab_size": 97, "positions": 130}  # of the goldens
IDS = np.array([[3, 4, 5, 6]])


@pytest.fixture(scope="module")
def tokenizer():
    words = ["the", "cat", "sat", "a", "dog", "ran", *(first + second for first in "xyz" for second in "abcdefghijklmnop")]
    trained = train_tokenizer(words * 5, "wordpiece", SIZES["vocab_size"])
    assert trained.vocab_size == SIZES["vocab_size"]
    return trained


@pytest.fixture(scope="module")
def classifier() -> Pretrained:
    return load(GOLDEN / "bert_classify")


@pytest.fixture
def with_tokenizer(tmp_path, tokenizer):
    """Returns a function that copies a golden folder, gives it a tokenizer, and changes its config."""

    def make(case: str, **changes) -> Path:
        folder = shutil.copytree(GOLDEN / case, tmp_path / case)
        tokenizer.save(folder)
        config = json.loads((folder / folders.CONFIG).read_text())
        (folder / folders.CONFIG).write_text(json.dumps(config | changes))
        return folder

    return make


def test_importing_fmjax_is_cheap():
    code = "import sys, fmjax; assert fmjax.__version__ and 'jax' not in sys.modules; fmjax.load; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    with pytest.raises(AttributeError):
        _ = fmjax.lod


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": [[3, 97]]}, r"input_ids: 97 is out of range; the vocabulary has 97 entries"),
        ({"input_ids": [[3, -1]]}, r"input_ids: -1 is out of range"),
        ({"input_ids": np.array([[2**32 + 3]])}, r"input_ids: 4294967299 is out of range"),
        ({"input_ids": np.zeros((1, 131), int)}, r"131 tokens exceed the 130 positions"),
        ({"input_ids": [[3.0]]}, r"input_ids: holds float64"),
        ({"input_ids": [3, 4]}, r"input_ids: has shape \(2,\)"),
        ({"input_ids": np.zeros((2, 0), int)}, r"input_ids: has shape \(2, 0\)"),
        ({"input_ids": [[3], [3, 4]]}, r"input_ids: its rows differ in length"),
        ({"attention_mask": [[1]]}, r"input_ids is missing"),
        ({"input_ids": IDS, "attention_mask": [[1, 1]]}, r"attention_mask: has shape \(1, 2\), but input_ids \(1, 4\)"),
        ({"input_ids": IDS, "attention_mask": [["a"] * 4]}, r"attention_mask: holds <U1"),
        ({"input_ids": IDS, "token_type_ids": [[0, 1, 2, 0]]}, r"token_type_ids: 2 is out of range; the token-type table has 2"),
        ({"input_ids": IDS, "position_ids": [[0, 1, 2, 130]]}, r"position_ids: 130 is out of range; the position table has 130"),
        ({"input_ids": IDS, "atention_mask": IDS}, r'"atention_mask" is not an input .*did you mean "attention_mask"'),
        ({"input_ids": IDS, "inputs_embeds": IDS}, r'"inputs_embeds" is not an input'),
    ],
)
def test_wrong_inputs_are_named(classifier, inputs, message):
    with pytest.raises(UserError, match=message):
        classifier.apply(**inputs)


def test_inputs_depend_on_the_family():
    with pytest.raises(UserError, match='"token_type_ids" is not an input'):
        load(GOLDEN / "distilbert_classify").apply(input_ids=IDS, token_type_ids=IDS)
    roberta = load(GOLDEN / "roberta_classify")
    padded = np.full((1, 140), 1)
    padded[0, 5:135] = 7
    batch = roberta.checked_batch({"input_ids": padded})
    assert batch["position_ids"].tolist() == [[-1] * 5 + list(range(130)) + [-1] * 5]
    padded[0, 4] = 7
    with pytest.raises(UserError, match="131 tokens exceed the 130 positions"):
        roberta.apply(input_ids=padded)


@pytest.mark.parametrize("kind", [int, bool, np.int8, np.float32])
def test_masks_of_any_type_mean_the_same(kind):
    family = models.family("bert")
    settings = family.Settings(**SIZES)
    batch = family.checked_batch({"input_ids": IDS, "attention_mask": np.array([[1, 0, 1, 1]], kind)}, settings)
    assert batch["attention_mask"].tolist() == [[True, False, True, True]]


def test_other_parts_of_the_file_are_kept_for_other_heads_and_not_saved(tmp_path):
    config = folders.read_config(GOLDEN / "bert_pretraining")
    folder = shutil.copytree(GOLDEN / "bert_pretraining", tmp_path / "model")
    (folder / folders.CONFIG).write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    model = load(folder)
    assert {"encoder/pooler/kernel", "head/nsp/bias"} <= set(pytree.names(model.params))
    model.save(tmp_path / "saved")
    assert "head/nsp/bias" not in pytree.names(load(tmp_path / "saved").params)


def test_a_head_that_is_missing_is_not_made_up(tmp_path):
    folder = shutil.copytree(GOLDEN / "roberta_mlm", tmp_path / "model")
    config = folders.read_config(folder)
    (folder / folders.CONFIG).write_text(json.dumps(config | {"architectures": ["RobertaForSequenceClassification"]}))
    with pytest.raises(UserError, match="RobertaForSequenceClassification lacks its head/classify"):
        load(folder)


def test_heads_that_are_not_known_are_reported(tmp_path, capsys):
    folder = shutil.copytree(GOLDEN / "bert_classify", tmp_path / "model")
    save_file(load_file(folder / folders.WEIGHTS) | {"foo_outputs.bias": np.ones(2, np.float32)}, folder / folders.WEIGHTS)
    load(folder)
    assert "not used: foo_outputs.bias" in capsys.readouterr().err


def test_masked_words_of_a_folder(with_tokenizer):
    model = load(with_tokenizer("bert_pretraining"))
    [first, second] = model.predict(["the [MASK] sat", "a [MASK] ran the [MASK] cat"])
    assert [len(row["masks"]) for row in (first, second)] == [1, 2]
    inputs = tasks.make({"name": "mlm"}).inputs(["the [MASK] sat"], using(model.tokenizer), 130, "example {}".format)
    place = inputs.pop("masked_positions")[0, 0]
    scores = jax.nn.softmax(model.apply(**inputs)["prediction_logits"][0, place])
    assert [found["token"] for found in first["masks"][0]] == [model.tokenizer.token(int(i)) for i in (-scores).argsort()[:5]]
    assert first["masks"][0][0]["score"] == pytest.approx(float(scores.max()), rel=1e-4)


def test_classes_of_a_folder(with_tokenizer):
    model = load(with_tokenizer("bert_classify"))
    [single, same] = model.predict(["the cat sat", {"text": "the cat sat"}])
    assert single == same and single["label"] in ("no", "yes", "maybe")
    [pair, same] = model.predict([("the cat sat", "a dog ran"), {"text": "the cat sat", "text_pair": "a dog ran"}])
    assert pair == same != single
    with pytest.raises(UserError, match="not a single one"):
        model.predict("the cat sat")


def fake(model: Pretrained, shapes: list) -> Pretrained:
    """Puts in the place of the network what notes the shape of its input and gives each head zeros."""

    def forward(batch):
        rows = len(batch["input_ids"])
        shapes.append(batch["input_ids"].shape)
        sizes = {"classify": (3,), "mlm": (batch.get("masked_positions", IDS).shape[1], SIZES["vocab_size"]), "nsp": (2,)}
        return {kind: np.zeros((rows, *sizes[kind])) for kind in model.model.heads}

    model.__dict__["_forward"] = forward
    return model


def test_examples_are_predicted_in_chunks(with_tokenizer):
    shapes: list = []
    model = fake(load(with_tokenizer("bert_pretraining")), shapes)
    assert len(model.predict(["the [MASK] sat"] * 32 + ["the [MASK] sat" + " cat" * 40] * 3)) == 35
    assert shapes == [(32, 32), (3, 64)]
    assert model.predict([]) == []


def test_problem_types_of_a_folder(with_tokenizer):
    model = load(with_tokenizer("bert_classify", problem_type="multi_label_classification"))
    [several] = fake(model, []).predict(["the cat"])
    assert several["scores"] == {"no": 0.5, "yes": 0.5, "maybe": 0.5}
    for problem, message in (("regression", "a regression with 3 outputs"), ("ranking", 'problem_type="ranking"')):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(model, config={**model.config, "problem_type": problem}).predict(["the cat"])


def test_models_without_predictions_say_so(with_tokenizer):
    with pytest.raises(UserError, match="ElectraForPreTraining has no human-readable output"):
        load(with_tokenizer("electra_rtd")).predict(["the cat"])
    with pytest.raises(UserError, match="no tokenizer"):
        load(GOLDEN / "bert_classify").predict(["the cat"])


def make_run(folder: Path, tokenizer, task: dict, steps: dict[int, dict], best: str | None = None) -> dict[int, dict]:
    """Writes a run as training does; returns the parameters that each step should load."""
    model = models.family("bert").build(heads=tasks.make(task).heads, **SIZES)
    config = {
        "model": {"name": "bert"} | dataclasses.asdict(model.settings),
        "task": task,
        "data": {"max_length": 16},
        "checkpoint": {"mode": "max"} | ({"best": best} if best else {}),
    }
    write_config(folder, config)
    tokenizer.save(folder / "tokenizer")
    rng = np.random.default_rng(0)
    expected = {}
    checkpoints = Checkpoints(folder / "checkpoints", keep=9, best=Best(best) if best else None)
    for step, metrics in steps.items():
        trees = {
            item: jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), abstract_params(model))
            for item in (("params", "ema") if best else ("params",))
        }
        checkpoints.save(step, trees | {"step": np.int32(step)}, {}, metrics)
        expected[step] = trees.get("ema", trees["params"])
    checkpoints.close()
    return expected


CLASSIFY = {"name": "classify", "labels": ["bad", "good"]}


def test_a_run_loads_its_newest_step(tmp_path, tokenizer):
    expected = make_run(tmp_path, tokenizer, {"name": "mlm", "nsp": True}, {5: {}, 10: {}})
    model = load(tmp_path)
    assert model.step == 10
    assert jax.tree.all(jax.tree.map(np.array_equal, model.params, expected[10]))
    assert {"prediction_logits", "seq_relationship_logits"} < set(model.apply(input_ids=IDS))
    assert len(fake(model, []).predict(["the [MASK] sat"])[0]["masks"]) == 1
    with pytest.raises(UserError, match="tokens, more than the 16"):
        model.predict(["the [MASK] " + "cat " * 14])


def test_a_run_prefers_its_best_step_and_its_average(tmp_path, tokenizer):
    steps = {5: {"accuracy": 0.9}, 10: {"accuracy": 0.8}}
    expected = make_run(tmp_path, tokenizer, CLASSIFY, steps, best="accuracy")
    model = load(tmp_path)
    assert model.step == 5
    assert jax.tree.all(jax.tree.map(np.array_equal, model.params, expected[5]))


@pytest.mark.parametrize(
    ("task", "architecture"),
    [
        ({"name": "mlm", "nsp": True}, "BertForPreTraining"),
        (CLASSIFY, "BertForSequenceClassification"),
        ({"name": "classify", "kind": "regression"}, "BertForSequenceClassification"),
    ],
)
def test_a_run_is_saved_as_a_folder(tmp_path, tokenizer, task, architecture):
    make_run(tmp_path / "run", tokenizer, task, {1: {}})
    run = load(tmp_path / "run")
    run.save(tmp_path / "folder")
    folder = load(tmp_path / "folder")
    assert folder.config["architectures"] == [architecture]
    assert folder.tokenizer.sha256 == run.tokenizer.sha256
    assert folder.model.settings == run.model.settings
    assert jax.tree.all(jax.tree.map(np.array_equal, run.params, folder.params))
    assert folder.config["pad_token_id"] == run.tokenizer.pad_id
    if task == CLASSIFY:
        assert class_names(folder.config) == ("bad", "good")
    if task.get("kind") == "regression":
        assert folder.config["problem_type"] == "regression"
    with pytest.raises(UserError, match="is a run directory"):
        folder.save(tmp_path / "run")


def test_runs_that_cannot_be_loaded_or_saved(tmp_path, tokenizer):
    make_run(tmp_path / "empty", tokenizer, CLASSIFY, {})
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load(tmp_path / "empty")
    make_run(tmp_path / "mean", tokenizer, CLASSIFY | {"pool": "mean"}, {1: {}})
    with pytest.raises(UserError, match="no model with the heads classify_mean"):
        load(tmp_path / "mean").save(tmp_path / "folder")
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "nothing")
    begun = tmp_path / "begun"  # what a run leaves whose data could not be read
    assert not check_workdir(begun) and [path.name for path in begun.iterdir()] == [".lock"]
    for read in (load, evaluate_run):
        with pytest.raises(UserError, match="begun: the run has no checkpoint yet; train it first, with the same --workdir$"):
            read(begun)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"config.json: no such file"):
        load(tmp_path / "bare")


def sampler() -> Pretrained:
    """Returns a GPT-2 that continues texts of letters by drawing."""
    letters = train_tokenizer([(string.ascii_letters + string.digits)[:61] * 9], "char", 61, lowercase=False)
    task = tasks.make({"name": "clm", "rows": "offset", "temperature": 1.5, "max_new_tokens": 6})
    return dataclasses.replace(
        load(GOLDEN / "generation" / "gpt2"), processors=using(letters), task=task, config={"data": {"max_length": 16}}
    )


def test_sampled_answers_do_not_depend_on_chunks(tmp_path):
    model = sampler()
    texts = [row["text"] for row in model.predict(["abc"] * 70)]
    assert len(set(texts)) > 60
    assert texts[:32] != texts[32:64]
    ids = model.tokenizer.encode_batch(["abc"])[0]
    tokens = model.generate(input_ids=np.stack([ids] * 70), attention_mask=np.ones((70, len(ids)), int))
    assert texts == [model.tokenizer.written(row[len(ids) :]) for row in tokens]
    assert [row["text"] for row in model.predict(["abc"] * 38, first=32)] == texts[32:]
    source = tmp_path / "texts.jsonl"
    source.write_text('{"text": "abc"}\n' * 70)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "load", lambda folder: model)
        predict.predict_file(tmp_path, source, tmp_path / "answers.jsonl")
    assert [json.loads(line)["text"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == texts


class Captioner(nn.Module):
    """An encoder-decoder whose encoder reads images, each of which favors the token of its brightest channel."""

    heads = MappingProxyType({"lm": MappingProxyType({})})
    settings = SimpleNamespace(positions=0)
    encoder_inputs = ("pixel_values",)
    start_id = 4

    def encode(self, batch):
        return {"hidden": batch["pixel_values"].mean(axis=(2, 3))}

    def empty_cache(self, rows, length):
        return {"index": jnp.int32(0), "layers": ()}

    def decode(self, batch, memory, cache):
        last = jax.nn.one_hot(batch["decoder_input_ids"][:, -1:], 5)
        return {"lm": jnp.pad(memory["hidden"], ((0, 0), (0, 2)))[:, None] - 9 * last}, cache


def test_an_encoder_may_read_images():
    def checked(arrays, settings):
        return {name: np.asarray(array, np.float32 if name == "pixel_values" else np.int32) for name, array in arrays.items()}

    family = models.Family("captioner", Captioner, SimpleNamespace, checked_batch=checked)
    model = Pretrained({}, family, Captioner(), {}, Processors())
    images = np.zeros((3, 3, 2, 2))
    for row, (bright, second) in enumerate(((0, 1), (2, 0), (1, 2))):
        images[row, bright], images[row, second] = 2, 1
    found = model.generate(pixel_values=images, max_new_tokens=3, return_scores=True)
    assert found.sequences.tolist() == [[4, 0, 1, 0], [4, 2, 0, 2], [4, 1, 2, 1]]
    assert (found.log_probs < 0).all()
    prompted = model.generate(pixel_values=images, decoder_input_ids=[[4, 1], [4, 2], [4, 3]], max_new_tokens=2, num_beams=2)
    assert prompted.tolist() == [[4, 1, 0, 1], [4, 2, 0, 2], [4, 3, 1, 2]]
    with pytest.raises(UserError, match=r"decoder_input_ids: has 2 rows, but pixel_values has shape \(3, 3, 2, 2\)"):
        model.generate(pixel_values=images, decoder_input_ids=[[4], [4]])
    with pytest.raises(UserError, match="pixel_values is missing"):
        model.generate(decoder_input_ids=[[4], [4]])
