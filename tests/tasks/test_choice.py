"""Multiple choice: columns and lists of endings, truncation, loss and accuracy, predictions, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processors import using
from support.sources import MemoryRecords

from fmjax import load
from fmjax.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from fmjax.errors import UserError
from fmjax.models import bert
from fmjax.tasks import make
from fmjax.tasks.choice import Task, shortened

GOLDEN = Path(__file__).parents[1] / "golden"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{number}" for number in range(36)]
SWAG = Task(context="sent1", start="sent2", endings=("ending0", "ending1"))


class Records(MemoryRecords):
    place, first = "swag.csv line", 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    return load_tokenizer(folder)


def test_columns_and_lists_of_endings(tokenizer):
    columns = Records([{"sent1": "w1 w2", "sent2": "w3", "ending0": "w4", "ending1": "w5 w6", "label": "1"}])
    lists = Records([{"context": "w1 w2", "endings": ["w3 w4", "w3 w5 w6"], "label": 1}])
    assert SWAG.resolve(columns) == Task().resolve(lists) == {"choices": 2}
    assert tuple(SWAG.reads) == ("sent1", "sent2", "ending0", "ending1") and Task(choices=3).resolve(lists) == {}
    rows = []
    for source, task in ((columns, {"context": "sent1", "start": "sent2", "endings": ("ending0", "ending1")}), (lists, {})):
        example = Task(choices=2, **task).examples(source, using(tokenizer), 9, train=True)[0]
        # The task of a Hugging Face folder does not know the number.
        assert Task(**task).examples(source, using(tokenizer), 9, train=False)[0]["labels"] == 1
        assert example["input_ids"].shape == (2, 9) and example["labels"] == 1 and example["labels"].dtype == np.int32
        assert example["attention_mask"].sum(axis=1).tolist() == [7, 8]
        rows.append([[tokenizer.token(int(i)) for i in row] for row in example["input_ids"]])
    assert rows[0] == rows[1]
    assert rows[0][1] == ["[CLS]", "w1", "w2", "[SEP]", "w3", "w5", "w6", "[SEP]", "[PAD]"]
    assert example["token_type_ids"][1].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0]


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(2, 20))
def test_the_longer_part_is_cut(first, second, most):
    context, ending = shortened(np.arange(first), np.arange(second), most)
    assert context.size + ending.size == min(first + second, most)
    assert np.array_equal(context, np.arange(context.size)) and np.array_equal(ending, np.arange(ending.size))
    for kept, whole, other in ((context, first, ending), (ending, second, context)):
        assert kept.size == whole or kept.size >= other.size - 1


def test_overlong_is_an_error_unless_cut(tokenizer):
    source = Records([{"context": "w1 w2 w3 w4", "endings": ["w5", "w6 w7 w8"], "label": 0}])
    with pytest.raises(UserError, match=r"line 2: 10 tokens exceed data\.max_length=8; .*overlong=truncate"):
        Task(choices=2).examples(source, using(tokenizer), 8, train=True)
    example = Task(choices=2, overlong="truncate").examples(source, using(tokenizer), 8, train=True)[0]
    assert example["attention_mask"].sum(axis=1).tolist() == [8, 8]
    with pytest.raises(UserError, match=r"data\.max_length=4 leaves no room for two tokens"):
        Task(choices=2).examples(source, using(tokenizer), 4, train=True)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"context": "w1", "endings": ["w2"], "label": 0}, "line 3: context, endings must be a context and two or more endings"),
        ({"context": "w1", "endings": "w2", "label": 0}, "line 3: context, endings must be a context and two or more endings"),
        ({"context": None, "endings": ["a", "b"], "label": 0}, "line 3: context, endings must be a context"),
        ({"context": "w1", "endings": ["a", "b", "c"], "label": 0}, "line 3: has 3 endings, but other records have 2"),
        (
            {"context": "w1", "endings": ["a", "b"], "label": 2},
            'line 3: column "label" holds 2, not the number of an ending, 0 to 1',
        ),
        ({"context": "w1", "endings": ["a", "b"], "label": "x"}, "line 3: column \"label\" holds 'x', not the number"),
        ({"context": "w1", "endings": ["a", "b"], "label": True}, 'line 3: column "label" holds True, not the number'),
    ],
)
def test_malformed_records_are_named(tokenizer, record, message):
    source = Records([{"context": "w1", "endings": ["w2", "w3"], "label": 0}, record])
    with pytest.raises(UserError, match=message) as caught:
        Task(choices=2).examples(source, using(tokenizer), 12, train=True)
    assert "\n" not in str(caught.value)


def test_settings_out_of_range_are_refused():
    for name, value in (("overlong", "cut"), ("label_smoothing", 1.0)):
        with pytest.raises(UserError, match=rf"task\.{name}="):
            make({"name": "choice", name: value})


def test_loss_and_metrics():
    scores = np.array([[0.5, 1.0, -1.0], [2.0, 0.0, 0.0], [0.0, 0.0, 3.0]], np.float32)
    batch = {"labels": np.array([1, 0, 1], np.int32)}
    logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    each = -logs[np.arange(3), batch["labels"]]
    outputs = {"choice": jnp.asarray(scores)[..., None]}
    assert float(Task().loss(outputs, batch)["choice"]) == pytest.approx(each.sum(), rel=1e-5)
    smoothed = Task(label_smoothing=0.3).loss(outputs, batch)["choice"]
    assert float(smoothed) == pytest.approx((0.7 * each - 0.3 * logs.mean(-1)).sum(), rel=1e-5)
    arrays = {name: np.asarray(array) for name, array in Task().predictions(outputs, batch).items()}
    values = Task().metrics(arrays, np.array([1, 1, 1.0]))
    assert values == {"loss": pytest.approx(each.mean(), rel=1e-5), "accuracy": pytest.approx(2 / 3)}
    assert Task().metrics(arrays, np.array([1, 1, 0.0]))["accuracy"] == 1.0


def test_endings_of_an_example_do_not_see_each_other(tokenizer):
    """A batch [B,N,L] gives what its rows give one by one."""
    task = Task(choices=2)
    source = Records({"context": f"w{i} w2", "endings": ["w3", "w4 w5"], "label": i % 2} for i in range(3))
    examples = task.examples(source, using(tokenizer), 8, train=True)
    batch = {name: np.stack([examples[i][name] for i in range(3)]) for name in examples[0]}
    model = bert.build(heads=task.heads, width=8, layers=1, attention_heads=2, mlp_width=8, vocab_size=41, positions=8)
    flat = {name: array.reshape(6, 8) for name, array in batch.items() if name != "labels"}

    def both(key):
        outputs, params = model.init_with_output(key, batch)
        return outputs, model.apply(params, flat)["choice"]

    outputs, alone = jax.jit(both)(jax.random.key(0))
    assert outputs["choice"].shape == (3, 2, 1) and outputs["hidden"].shape == (3, 2, 8, 8)
    np.testing.assert_allclose(alone.reshape(3, 2, 1), outputs["choice"], atol=1e-6)
    assert model.forward_flops(batch) == model.forward_flops(flat)


def test_a_folder_predicts(tmp_path):
    shutil.copytree(GOLDEN / "bert_choice", tmp_path / "model")
    (tmp_path / "model" / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    model = load(tmp_path / "model")
    first, second = model.predict([("w1 w2", ["w3", "w4 w5", "w6"]), {"context": "w7", "endings": ["w8", "w9", "w10"]}])
    assert first["text"] == ["w3", "w4 w5", "w6"][first["choice"]] and first["score"] == max(first["scores"])
    assert sum(second["scores"]) == pytest.approx(1, abs=1e-5) and len(second["scores"]) == 3
    with pytest.raises(UserError, match="example 1: has 2 endings, but example 0 has 3; use the same number"):
        model.predict([("w1", ["w3", "w4", "w5"]), ("w1", ["w3", "w4"])])
    with pytest.raises(UserError, match="example 0: is not a question with endings; pass an object with context, endings"):
        model.predict(["w1"])
    # The folder has 40 positions; nothing is cut without a word.
    with pytest.raises(UserError, match=r"^example 1: 43 tokens exceed data.max_length=40; shorten the text$"):
        model.predict([("w1", ["w3", "w4"]), ("w1 " * 38, ["w3 w4", "w4"])])
    ids = np.ones((2, 8), np.int32)
    with pytest.raises(UserError, match=r"input_ids: has shape \(2, 8\); pass \[rows, choices, tokens\]"):
        model.apply(input_ids=ids)
