"""Masked language modelling: what is masked, how documents are packed and paired, and that the loss is of the masked tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processors import using
from support.sources import MemoryRecords

from fmjax.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from fmjax.errors import UserError
from fmjax.models import bert
from fmjax.tasks import make
from fmjax.tasks.mlm import Masker, Task

WORDS = [f"w{number}" for number in range(60)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)
ENDING = len(SPECIAL) + len(WORDS)  # the id of ##s
VOCABULARY = ENDING + 1
SIZE = {"width": 16, "layers": 2, "attention_heads": 2, "mlp_width": 32, "vocab_size": VOCABULARY, "positions": 32}


class Records(MemoryRecords):
    place, first = "docs.txt record", 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS, "##s"]) + "\n")
    return load_tokenizer(folder)


def documents(*lengths: int, seed: int = 0, first: int = 0, last: int = len(WORDS)) -> Records:
    """Returns documents of random words, some of them with an ending."""
    rng = np.random.default_rng(seed)
    endings = ("", "s", "ss")

    def words(length: int) -> str:
        return " ".join(WORDS[rng.integers(first, last)] + endings[rng.integers(3)] for _ in range(length))

    return Records({"text": words(length)} for length in lengths)


def restored(row: dict) -> np.ndarray:
    """Returns the ids before masking."""
    ids = row["input_ids"].copy()
    real = row["masked_weights"] > 0
    ids[row["masked_positions"][real]] = row["masked_labels"][real]
    return ids


def test_shares_of_mask_random_and_kept_tokens(tokenizer):
    masker = Masker(Task(mask_rate=0.5), tokenizer, 400)
    rng = np.random.default_rng(0)
    ids = rng.integers(len(SPECIAL), VOCABULARY, 400).astype(np.int32)
    placed, changed = [], []
    for _ in range(500):
        row = masker(ids, rng)
        assert (row["masked_labels"] == ids[row["masked_positions"]]).all() and row["masked_weights"].all()
        placed.append(row["masked_positions"])
        changed.append(row["input_ids"][row["masked_positions"]])
        untouched = np.setdiff1d(np.arange(400), row["masked_positions"])
        assert (row["input_ids"][untouched] == ids[untouched]).all()
    seen, positions = np.concatenate(changed), np.concatenate(placed)
    assert seen.size == 100_000
    kept = seen == ids[positions]
    noise = seen[(seen != MASK) & ~kept]
    # Of the random tokens, one in 61 happens to be the one that was there. Five standard errors are 0.006 and less.
    assert (seen == MASK).mean() == pytest.approx(0.8, abs=0.006)
    assert kept.mean() == pytest.approx(0.1 + 0.1 / 61, abs=0.005)
    assert noise.size / seen.size == pytest.approx(0.1 - 0.1 / 61, abs=0.005)
    assert noise.min() >= len(SPECIAL)
    counts = np.bincount(noise, minlength=VOCABULARY)[len(SPECIAL) :]
    assert counts.min() > 0.5 * counts.mean() and counts.max() < 1.5 * counts.mean()
    times = np.bincount(positions, minlength=400)
    assert times.min() > 170 and times.max() < 330  # 250 expected, with a standard error of 11


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any), st.floats(0.05, 0.9), st.booleans(), st.integers(0, 99))
def test_rows_are_masked_by_the_rules(tokenizer, lengths, rate, whole_word, seed):
    task = Task(mask_rate=rate, whole_word=whole_word)
    examples = task.examples(documents(*lengths, seed=seed), using(tokenizer), 16, train=True)
    most = max(1, round(rate * 16))
    for index in range(len(examples)):
        example = examples[index]
        row = examples.draw(example, np.random.default_rng(seed))
        again = examples.draw(example, np.random.default_rng(seed))
        assert all(np.array_equal(row[name], again[name]) for name in row)
        assert {name: array.dtype for name, array in row.items()} == {
            "input_ids": np.int32, "segment_ids": np.int32, "position_ids": np.int32,
            "masked_positions": np.int32, "masked_labels": np.int32, "masked_weights": np.float32,
        }  # fmt: skip
        for name in ("masked_positions", "masked_labels", "masked_weights"):
            assert row[name].shape == (most,)
        count = int(row["masked_weights"].sum())
        assert row["masked_weights"].tolist() == [1] * count + [0] * (most - count)
        assert not row["masked_positions"][count:].any() and not row["masked_labels"][count:].any()
        places = row["masked_positions"][:count]
        assert (np.diff(places) > 0).all()
        original = example["input_ids"]
        assert (original[places] >= len(SPECIAL)).all()
        assert np.array_equal(restored(row), original)
        ordinary = int((original >= len(SPECIAL)).sum())
        wanted = min(most, max(1, round(rate * ordinary)))
        assert count <= wanted if whole_word else count == wanted
        if whole_word:
            words = np.cumsum(original != ENDING)
            hit = np.isin(np.arange(16), places)
            for word in np.unique(words[original >= len(SPECIAL)]):
                assert len(set(hit[(words == word) & (original >= len(SPECIAL))])) == 1


def test_single_tokens_split_words_but_whole_words_do_not(tokenizer):
    source = Records([{"text": " ".join(["w1ss"] * 8)}])
    halves = {}
    for whole_word in (False, True):
        examples = Task(mask_rate=0.4, whole_word=whole_word).examples(source, using(tokenizer), 26, train=True)
        rows = [examples.draw(examples[0], np.random.default_rng(seed)) for seed in range(20)]
        places = [row["masked_positions"][row["masked_weights"] > 0] for row in rows]
        halves[whole_word] = any(len(place) % 3 or (place[::3] + 2 != place[2::3]).any() for place in places)
        assert len({tuple(place) for place in places}) > 5
        assert whole_word is False or all(len(place) == 9 for place in places)  # of 10 wanted, three words of three
    assert halves == {False: True, True: False}


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any), st.integers(4, 24))
def test_packed_rows_have_every_token_once(tokenizer, lengths, max_length):
    source = documents(*lengths)
    examples = Task().examples(source, using(tokenizer), max_length, train=True)
    found: list[list[int]] = []
    for index in range(len(examples)):
        row = examples[index]
        ids, segments, positions = row["input_ids"], row["segment_ids"], row["position_ids"]
        filled = int((segments > 0).sum())
        assert (ids[filled:] == PAD).all() and not segments[filled:].any() and not positions[filled:].any()
        assert (segments[:filled] > 0).all() and segments[0] == 1 and set(np.diff(segments[:filled])) <= {0, 1}
        for segment in range(1, segments.max() + 1):
            piece = ids[segments == segment]
            assert piece[0] == CLS and piece[-1] == SEP and piece.size > 2 and (piece[1:-1] >= len(SPECIAL)).all()
            assert positions[segments == segment].tolist() == list(range(piece.size))
            found.append(piece[1:-1].tolist())
    tokens = [ids.tolist() for ids in tokenizer.encode_batch([record["text"] for record in source])]
    most = max_length - 2
    assert sorted(found) == sorted(ids[begin : begin + most] for ids in tokens for begin in range(0, len(ids), most))
    assert examples.fill == {"input_ids": pytest.approx(np.mean([examples[i]["segment_ids"] > 0 for i in range(len(examples))]))}


@pytest.fixture(scope="module")
def model_and_params():
    """A small BERT whose parameters, biases and norms included, are random and large enough to matter."""
    model = bert.build(heads={"mlm": {}, "nsp": {}}, **SIZE)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), {"input_ids": jnp.zeros((1, 8), jnp.int32)})["params"])
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


def test_packed_logits_are_those_of_each_document_alone(tokenizer, model_and_params):
    model, params = model_and_params
    apply = jax.jit(lambda batch: model.apply({"params": params}, batch)["mlm"])
    packed = Task().examples(documents(4, 3), using(tokenizer), 24, train=True)
    assert len(packed) == 1
    row = {name: array[None] for name, array in packed[0].items()}
    together = np.asarray(apply(row))[0]
    alone = {name: np.zeros((2, 24), np.int32) for name in row}  # each document in a row of its own
    for number in (1, 2):
        piece = packed[0]["input_ids"][packed[0]["segment_ids"] == number]
        alone["input_ids"][number - 1, : piece.size] = piece
        alone["segment_ids"][number - 1, : piece.size] = 1
        alone["position_ids"][number - 1, : piece.size] = np.arange(piece.size)
    apart = np.asarray(apply(alone))
    for number in (1, 2):
        own, single = together[packed[0]["segment_ids"] == number], apart[number - 1][alone["segment_ids"][number - 1] == 1]
        np.testing.assert_allclose(own, single, atol=1e-5)
    # Were documents to see each other, or positions to run on, it would show.
    for name, array in (("segment_ids", np.ones((1, 24), np.int32)), ("position_ids", np.arange(24, dtype=np.int32)[None])):
        assert np.abs(np.asarray(apply(row | {name: array}))[0] - together)[row["segment_ids"][0] > 0].max() > 1e-2


def test_the_loss_is_that_of_full_logits_at_the_masked_positions(tokenizer, model_and_params):
    model, params = model_and_params
    task = Task(mask_rate=0.3, nsp=True)
    examples = task.examples(documents(9, 12, 2, 7), using(tokenizer), 24, train=True)
    rows = [examples.draw(examples[index], np.random.default_rng(index)) for index in range(len(examples))]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    assert len({float(row["masked_weights"].sum()) for row in rows}) > 1
    everywhere = {name: array for name, array in batch.items() if name != "masked_positions"}
    full = np.asarray(jax.jit(lambda batch: model.apply({"params": params}, batch)["mlm"])(everywhere), np.float64)
    outputs = jax.jit(lambda batch: model.apply({"params": params}, batch))(batch)
    logs = full - np.log(np.exp(full).sum(-1, keepdims=True))
    total, right, count = 0.0, 0, 0
    for row, drawn in enumerate(rows):
        for place, label, weight in zip(drawn["masked_positions"], drawn["masked_labels"], drawn["masked_weights"], strict=True):
            total -= weight * logs[row, place, label]
            right += weight * (full[row, place].argmax() == label)
            count += weight
    pairs = np.asarray(outputs["nsp"], np.float64)
    logs = pairs - np.log(np.exp(pairs).sum(-1, keepdims=True))
    terms, weights = task.loss(outputs, batch), task.weights(batch)
    assert float(terms["mlm"]) == pytest.approx(total, rel=1e-5) and float(weights["mlm"]) == count
    assert float(terms["nsp"]) == pytest.approx(-logs[np.arange(len(rows)), batch["nsp_labels"]].sum(), rel=1e-5)
    assert float(weights["nsp"]) == len(rows)
    arrays = {name: np.asarray(array) for name, array in task.predictions(outputs, batch).items()}
    values = task.metrics(arrays, np.ones(len(rows)))
    assert values["loss"] == pytest.approx(total / count, rel=1e-5) and values["accuracy"] == pytest.approx(right / count)
    assert values["nsp_accuracy"] == pytest.approx((pairs.argmax(-1) == batch["nsp_labels"]).mean())
    # A row that only fills up the batch counts for nothing.
    valid = np.array([1.0] * (len(rows) - 1) + [0.0])
    rest = {name: array[:-1] for name, array in arrays.items()}
    assert task.metrics(arrays, valid) == task.metrics(rest, valid[:-1])


def test_pairs_are_of_one_document_or_of_two(tokenizer):
    # Document d has the words 10 d to 10 d + 9 alone; one of a single word has nothing to pair.
    lengths = (30, 1, 12, 7, 40, 5)
    source = Records(
        documents(length, seed=number, first=10 * number, last=10 * number + 10)[0] for number, length in enumerate(lengths)
    )
    source[1] = {"text": "w10"}
    examples = Task(nsp=True).examples(source, using(tokenizer), 20, train=True)
    tokens = [ids.tolist() for ids in tokenizer.encode_batch([record["text"] for record in source])]
    assert len(examples) == sum(-(-len(ids) // 17) - (len(ids) % 17 == 1) for ids in tokens)

    def document(ids: np.ndarray) -> int:
        (found,) = {(int(word) - len(SPECIAL)) // 10 for word in ids if word != ENDING} or {-1}
        return found

    random = []
    for index in range(len(examples)):
        for seed in range(40):
            row = examples.draw(examples[index], np.random.default_rng(seed))
            ids, types, real = restored(row), row["token_type_ids"], row["attention_mask"] == 1
            length = int(real.sum())
            assert ids.shape == (20,) and (ids[length:] == PAD).all() and real[:length].all() and not types[length:].any()
            first_end, second_end = np.flatnonzero(ids == SEP)
            assert ids[0] == CLS and second_end == length - 1
            assert types[: first_end + 1].sum() == 0 and (types[first_end + 1 : length] == 1).all()
            first, second = ids[1:first_end], ids[first_end + 1 : second_end]
            assert first.size and second.size
            one, two = document(first), document(second)
            random.append(int(row["nsp_labels"]))
            if random[-1]:
                assert one != two or one == -1  # a part may be nothing but endings, which tell no document
            else:
                whole = [*first.tolist(), *second.tolist()]
                assert one in (two, -1) or two == -1
                assert any(whole == ids[at : at + len(whole)] for ids in tokens for at in range(len(ids)))
    assert np.mean(random) == pytest.approx(0.5, abs=0.1)


def test_pairs_split_where_words_start(tokenizer):
    source = Records([{"text": "w1ss w2ss w3ss"}, {"text": "w4s w5s"}])
    examples = Task(nsp=True).examples(source, using(tokenizer), 20, train=True)
    for seed in range(20):
        row = examples.draw(examples[0], np.random.default_rng(seed))
        assert restored(row)[np.flatnonzero(restored(row) == SEP)[0] + 1] != ENDING


def test_pairs_need_two_documents(tokenizer):
    with pytest.raises(UserError, match=r"task\.nsp=true needs at least two documents"):
        Task(nsp=True).examples(Records([{"text": "w1 w2 w3"}, {"text": "w4"}]), using(tokenizer), 20, train=True)


@pytest.mark.parametrize(
    ("records", "length", "message"),
    [
        ([{"text": "w1"}, {"text": 7}], 16, r"docs.txt record 2: column .text. holds 7, not text"),
        ([{"text": ""}, {"text": " "}], 16, "no text in any of 2 records"),
        ([{"text": "w1"}], 2, "max_length leaves no room"),
        ([{"txt": "w1"}], 16, r'no column "text" \(did you mean "txt"\?\)'),
    ],
)
def test_unusable_data_are_refused(tokenizer, records, length, message):
    with pytest.raises(UserError, match=message):
        Task().examples(Records(records), using(tokenizer), length, train=True)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5])
def test_mask_rates_out_of_range_are_refused(rate):
    with pytest.raises(UserError, match=r"task\.mask_rate="):
        make({"name": "mlm", "mask_rate": rate})


def test_heads_follow_the_settings():
    assert make({"name": "mlm"}).heads == {"mlm": {}}
    assert make({"name": "mlm", "nsp": True}).heads == {"mlm": {}, "nsp": {}}
    with pytest.raises(UserError, match=r'task\.mask_rat is not a setting \(did you mean "mask_rate"'):
        make({"name": "mlm", "mask_rat": 0.1})
    with pytest.raises(UserError, match=r'task\.name="mln": no such task \(did you mean "mlm"'):
        make({"name": "mln"})


def test_predictions_are_made_at_every_mask(tokenizer):
    task = Task()
    batch = task.inputs(["w1 [MASK] w2 [MASK]", {"text": "[MASK]s w9"}], using(tokenizer), 16, "example {}".format)
    assert batch["masked_positions"].tolist() == [[2, 4], [1, 0]]
    assert batch["input_ids"][0].tolist() == [CLS, 6, MASK, 7, MASK, SEP]
    assert batch["attention_mask"].sum(axis=1).tolist() == [6, int((batch["input_ids"][1] != PAD).sum())]
    logits = np.full((2, 2, VOCABULARY), -50.0, np.float32)
    logits[0, 0, [10, 11]] = np.log([0.75, 0.25])
    logits[0, 1, 12] = logits[1, 0, 13] = 0
    found = task.describe({"mlm": logits}, batch, using(tokenizer))
    assert [[mask[0]["token"] for mask in row["masks"]] for row in found] == [["w5", "w7"], ["w8"]]
    assert found[0]["masks"][0][1]["token"] == "w6" and len(found[0]["masks"][0]) == 5
    assert [mask["score"] for mask in found[0]["masks"][0][:2]] == pytest.approx([0.75, 0.25], abs=1e-5)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ("w1 w2", r"example 1: has no \[MASK\]"),
        ("[MASK] " + "w1 " * 20, "example 1: has 23 tokens, more than the 16"),
        ({"txt": "[MASK]"}, 'example 1.*"text"'),
        (7, "example 1"),
        ({"text": 7}, "example 1"),
    ],
)
def test_texts_that_cannot_be_predicted_are_refused(tokenizer, example, message):
    with pytest.raises(UserError, match=message):
        Task().inputs(["[MASK]", example], using(tokenizer), 16, "example {}".format)
