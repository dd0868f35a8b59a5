"""A mixture of classification and masked language modelling: its settings, its batches, and a run that is judged by the first."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.processors import using
from support.sources import MemoryRecords

from fmjax import pytree
from fmjax.config import apply_overrides, open_dict, to_dict
from fmjax.data.records import Bundle
from fmjax.data.stream.batches import TrainBatches
from fmjax.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from fmjax.defaults import experiment
from fmjax.errors import UserError
from fmjax.inference.convert import convert
from fmjax.inference.load import load
from fmjax.models import bert
from fmjax.tasks import make
from fmjax.tasks.classify import Task as Classify
from fmjax.tasks.mlm import Task as Mlm
from fmjax.train.experiment import prepare
from fmjax.train.loop import train
from fmjax.train.wrappers import MixtureModel, main_part, mix

WORDS = [f"w{number}" for number in range(20)]
SIZE = {"width": 8, "layers": 1, "attention_heads": 2, "mlp_width": 8, "vocab_size": 30, "positions": 8}
CLASSIFY = {"name": "classify", "labels": ["a", "b"]}


class Records(MemoryRecords):
    place, first = "line", 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    return load_tokenizer(folder)


def bundle() -> Bundle:
    labelled = Records({"text": f"w{number} w1 w2", "label": "ab"[number % 2]} for number in range(6))
    free = Records({"text": " ".join(WORDS[number : number + 6])} for number in range(14))
    return Bundle({"classify": labelled, "mlm": free})


def mixture(**mlm: object):
    return make({"name": "mixture", "parts": {"classify": dict(CLASSIFY), "mlm": {"name": "mlm"} | mlm}})


def test_a_part_is_a_task_with_a_factor_and_a_split():
    task = mixture(mask_rate=0.4, factor=0.25, split="unlabelled")
    assert task.tasks == {"classify": Classify(labels=("a", "b")), "mlm": Mlm(mask_rate=0.4)}
    assert task.main == Classify(labels=("a", "b")) and task.measures == task.main.measures and task.reads == {"text": "text"}
    assert task.heads == {"classify": {"classes": 2}, "mlm": {}}
    assert task.splits == {"classify": "train", "mlm": "unlabelled"}


def test_labels_are_found_in_the_part_that_has_them():
    task = make({"name": "mixture", "parts": {"classify": {"name": "classify"}, "mlm": {"name": "mlm", "factor": 0.5}}})
    found = task.resolve(bundle())
    assert found == {"parts": {"classify": {"name": "classify", "labels": ("a", "b")}, "mlm": {"name": "mlm", "factor": 0.5}}}


def test_an_epoch_is_the_first_parts_and_the_others_are_drawn(tokenizer):
    examples = mixture().examples(bundle(), using(tokenizer), 8, train=True)
    assert len(examples) == 6 and examples.classes.tolist() == [0, 1, 0, 1, 0, 1]
    batches = TrainBatches(examples, batch_size=6, seed=0)
    first, second = next(batches), next(batches)
    assert {name.split("/")[0] for name in first} == {"classify", "mlm"}
    assert sorted(first["classify/input_ids"][:, 1].tolist()) == list(range(5, 11))  # each once
    seen = np.concatenate([first["mlm/input_ids"], second["mlm/input_ids"]])
    assert len(np.unique(seen, axis=0)) > 6
    state = batches.state()
    expected = next(batches)
    again = TrainBatches(mixture().examples(bundle(), using(tokenizer), 8, train=True), batch_size=6, seed=0)
    again.restore(state)
    found = next(again)
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)
    evaluated = mixture().examples(bundle().parts["classify"], using(tokenizer), 8, train=False)
    assert set(evaluated[0]) == {"input_ids", "token_type_ids", "attention_mask", "labels"}


def test_terms_are_those_of_the_parts_times_their_factors():
    task = mixture(factor=0.25)
    rng = np.random.default_rng(0)
    outputs = {
        "classify": {"classify": rng.normal(size=(3, 2)).astype(np.float32)},
        "mlm": {"mlm": rng.normal(size=(3, 2, 9)).astype(np.float32)},
    }
    parts = {
        "classify": {"labels": np.array([0, 1, 1])},
        "mlm": {"masked_labels": np.full((3, 2), 4), "masked_weights": np.array([[1, 1], [1, 0], [1, 0]], np.float32)},
    }
    batch = pytree.names(parts)
    weights, terms = task.weights(batch), task.loss(outputs, batch)
    assert {name: float(weight) for name, weight in weights.items()} == {"classify/classify": 3, "mlm/mlm": 4}
    single = Classify(labels=("a", "b")).loss(outputs["classify"], parts["classify"])["classify"]
    masked = Mlm().loss(outputs["mlm"], parts["mlm"])["mlm"]
    assert float(terms["classify/classify"]) == pytest.approx(float(single))
    assert float(terms["mlm/mlm"]) == pytest.approx(0.25 * float(masked))


def test_the_model_has_one_body_of_which_each_part_uses_what_its_heads_read():
    task = make({"name": "mixture", "parts": {"classify": CLASSIFY | {"pool": "mean"}, "mlm": {"name": "mlm"}}})
    model = bert.build(heads=task.heads, **SIZE)
    mixed = mix(model, task)
    ids = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    parts = {
        "classify": {"input_ids": ids, "attention_mask": jnp.ones_like(ids), "pool_weights": jnp.ones((2, 4))},
        "mlm": {"input_ids": ids + 3, "masked_positions": jnp.array([[1], [2]])},
    }
    batch = {f"{part}/{name}": array for part, own in parts.items() for name, array in own.items()}
    key = jax.random.key(0)

    def forms(tree: object) -> object:
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    params = jax.eval_shape(mixed.init, key, batch)
    assert forms(params) == forms(jax.eval_shape(model.init, key, parts["classify"]))
    outputs = jax.eval_shape(lambda params: mixed.apply(params, batch, rngs={"dropout": key}), params)
    assert set(outputs["classify"]) == {"hidden", "classify_mean"} and set(outputs["mlm"]) == {"hidden", "mlm"}
    assert outputs["classify"]["classify_mean"].shape == (2, 2) and outputs["mlm"]["mlm"].shape == (2, 1, 30)
    flops = mixed.forward_flops(batch)
    assert flops == sum(mixed.parts[part].forward_flops(own) for part, own in parts.items()) and mixed.settings == model.settings
    assert main_part(mixed, task, batch)[1] is task.main
    assert mix(model, task.main) is model and main_part(model, task.main, batch) == (model, task.main, batch)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"classify": CLASSIFY}, "task.parts: a mixture has at least two parts"),
        ({"classify": CLASSIFY, "mlm": {}}, r"task\.parts\.mlm: names no task; set task\.parts\.mlm\.name"),
        ({"classify": CLASSIFY, "more": {"name": "mixture"}}, r"task\.parts\.more: names no task"),
        ({"classify": CLASSIFY, "mlm": {"name": "mlm", "factor": 0.0}}, r"task\.parts\.mlm\.factor=0\.0: must be above 0"),
        ({"classify": CLASSIFY, "mlm": {"name": "mml"}}, r'task\.parts\.mlm\.name="mml": no such task'),
        ({"classify": CLASSIFY, "mlm": {"name": "mlm", "rate": 1}}, r"task\.parts\.mlm\.rate is not a setting"),
        ({"classify": CLASSIFY, "mlm": {"name": "mlm", "mask_rate": 2.0}}, r"task\.parts\.mlm\.mask_rate=2\.0: must be above"),
    ],
)
def test_mistakes_name_the_part(parts, message):
    with pytest.raises(UserError, match=message) as raised:
        make({"name": "mixture", "parts": parts})
    assert "\n" not in str(raised.value)


def test_two_parts_cannot_want_different_heads_of_a_kind():
    other = CLASSIFY | {"labels": ["a", "b", "c"]}
    with pytest.raises(UserError, match=r'task\.parts\.topic: its head "classify" has .*; a model has one head of each kind'):
        make({"name": "mixture", "parts": {"mood": CLASSIFY, "topic": other}}).heads  # noqa: B018


def config(folder, steps: int = 2):
    rng = np.random.default_rng(0)
    rows = [f"{' '.join(rng.choice(WORDS, 5))},{label}" for label in "aaaaab" * 4]
    (folder / "train.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    (folder / "dev.csv").write_text("\n".join(["text,label", *rows[:6]]) + "\n")
    (folder / "free.csv").write_text("\n".join(["text", *(" ".join(rng.choice(WORDS, 6)) for _ in range(30))]) + "\n")
    made = experiment("bert", "classify", "mlm")
    made.model.update({name: value for name, value in SIZE.items() if name != "vocab_size"})
    made.model.update({f"{name}dropout": 0.0 for name in ("", "embedding_", "attention_", "classifier_")})  # slow to compile
    made.data.files = open_dict(
        train=str(folder / "train.csv"), validation=str(folder / "dev.csv"), unlabelled=str(folder / "free.csv")
    )
    made.data.batch_size, made.data.max_length, made.data.balance, made.data.vocab_size = 8, 8, "oversample", 100
    made.train.steps, made.checkpoint.best = steps, "accuracy"
    apply_overrides(made, [("task.parts.mlm.factor", "0.5"), ("task.parts.mlm.split", "unlabelled")])
    return made


def test_a_run_trains_all_parts_and_is_judged_and_exported_by_the_first(tmp_path, capsys):
    given = config(tmp_path)
    with pytest.raises(UserError, match=r"config\.task\.parts\.mlm\.facto=1: no such key"):
        apply_overrides(given, [("task.parts.mlm.facto", "1")])
    run = tmp_path / "run"
    metrics = train(to_dict(given), run)
    assert {"loss", "accuracy", "f1", "roc_auc"} <= set(metrics)
    assert "data.balance=oversample: [20, 4] examples per class become [20, 20]" in capsys.readouterr().err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in lines if "loss" in line)
    assert last["loss"] == pytest.approx(last["loss_classify/classify"] + last["loss_mlm/mlm"], rel=1e-5)

    stored = json.loads((run / "config.json").read_text())["task"]
    assert list(stored["parts"]) == ["classify", "mlm"] and stored["parts"]["classify"]["labels"] == ["a", "b"]
    provenance = json.loads((run / "provenance.json").read_text())
    assert {"classify", "mlm"} <= set(provenance["data"]["train"])
    again = prepare(to_dict(config(tmp_path, steps=4)), run)
    assert again.resumed and isinstance(again.built.model, MixtureModel) and again.built.steps == 4

    found = load(run)
    assert set(found.model.heads) == {"classify"} and "mlm" in found.params["head"]
    assert {row["label"] for row in found.predict(["w1 w2", "w3"])} <= {"a", "b"}
    convert(run, tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]


def test_a_split_that_is_not_there_is_named(tmp_path):
    given = config(tmp_path)
    apply_overrides(given, [("task.parts.mlm.split", "free")])
    with pytest.raises(UserError, match=r'data\.files has no "free", only .*; set --config\.data\.files\.free=FILE'):
        prepare(to_dict(given), tmp_path / "run")
