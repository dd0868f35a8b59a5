"""Span corruption: what is taken out can be put back, T5's lengths and densities, UL2's mixture, predictions, refusals."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from support.processors import using
from support.sources import MemoryRecords

from fmjax.data.stream.batches import TrainBatches, eval_batches
from fmjax.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from fmjax.errors import UserError
from fmjax.tasks import make
from fmjax.tasks.corpus import Corpus, MemoryDocuments
from fmjax.tasks.span_corruption import (
    UL2,
    Corrupter,
    PackedRows,
    Rows,
    Task,
    sentinels,
    written_spans,
)

TEXTS = [
    f"The {animal} {verb} over number {n}, 你好。" for n in range(40) for animal, verb in (("dog", "jumps"), ("cat", "walks"))
]


@functools.cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, "t5", 450, lowercase=False)


class Texts(MemoryRecords):
    """Records of texts."""

    def __init__(self, texts: list[str]):
        super().__init__({"text": text} for text in texts)


def rows(task: Task, max_length: int = 32, texts: list[str] = TEXTS):
    """Returns rows that run on over the ends of texts."""
    return dataclasses.replace(task, rows="joined").examples(Texts(texts), using(tokenizer()), max_length, train=True)


def put_back(example: dict[str, np.ndarray], opening: int = 0, segment: int = 0) -> list[int]:
    """Returns the tokens that the row had, or one segment of a packed one."""
    marks = sentinels(tokenizer())
    there = [example["label_weights"] > 0, example["attention_mask"] > 0]
    if segment:
        there = [example["decoder_segment_ids"] == segment, example["segment_ids"] == segment]
    target, source = example["labels"][there[0]], example["input_ids"][there[1]]
    assert source[-1] == target[-1] == tokenizer().eos_id
    spans = written_spans(target, tokenizer(), marks)
    kept = source[opening:-1].tolist()
    assert [number for number in kept if number in marks] == marks[: len(spans)].tolist() == list(spans)[::-1]
    return [int(token) for number in kept for token in spans.get(number, [number])]


@pytest.mark.parametrize("written", [("R:3:0.15",), ("X:8:0.5",), ("S:0.25",), UL2])
def test_putting_spans_back_gives_the_text_of_every_row(written):
    task = Task(denoisers=written)
    examples = rows(task)
    text = [token for index in range(len(examples)) for token in examples[index]["tokens"].tolist()]
    whole = np.concatenate(tokenizer().encode_batch(TEXTS)).tolist()
    assert text == whole[: len(text)] and len(whole) - len(text) < 2
    shapes = set()
    for index in range(len(examples)):
        example = examples[index]
        drawn = examples.draw(example, np.random.default_rng(index))
        assert put_back(drawn) == example["tokens"].tolist()
        shapes.add(tuple((name, array.shape, array.dtype) for name, array in drawn.items()))
        for name, array in (("input_ids", drawn["attention_mask"]), ("labels", drawn["label_weights"])):
            assert np.all(drawn[name][array == 0] == tokenizer().pad_id) and np.all(np.diff(array) <= 0)
    assert len(shapes) == 1


@pytest.mark.parametrize("written", [("R:3:0.15",), UL2])
def test_packed_rows_give_every_text_back(written):
    texts = [*TEXTS[:30], " ".join(TEXTS[30:46]), "dog", ""]
    examples = Task(denoisers=written).examples(Texts(texts), using(tokenizer()), 64, train=True)
    found, shapes, filled = [], set(), []
    for index in range(len(examples)):
        drawn = examples.draw(examples[index], np.random.default_rng(index))
        shapes.add(tuple((name, array.shape, array.dtype) for name, array in drawn.items()))
        filled.append([drawn["attention_mask"].mean(), drawn["label_weights"].mean()])
        count = drawn["segment_ids"].max()
        found += [put_back(drawn, segment=segment) for segment in range(1, count + 1)]
        for prefix, real in (("", drawn["attention_mask"]), ("decoder_", drawn["label_weights"])):
            segments, positions = drawn[f"{prefix}segment_ids"], drawn[f"{prefix}position_ids"]
            assert np.array_equal(segments > 0, real > 0) and set(segments[real > 0]) == set(range(1, count + 1))
            for segment in range(1, count + 1):
                assert positions[segments == segment].tolist() == list(range((segments == segment).sum()))
    pieces = [piece for ids in tokenizer().encode_batch(texts) for piece in pieces_of(ids.tolist(), examples.corrupter.length)]
    assert sorted(found) == sorted(piece for piece in pieces if len(piece) > 1) and len(shapes) == 1
    # What is drawn fills the rows as it was said, of several denoisers on average.
    if len(written) == 1:
        assert list(examples.fill.values()) == pytest.approx(np.mean(filled, axis=0).tolist())
    assert list(examples.fill.values()) == pytest.approx(np.mean(filled, axis=0).tolist(), abs=0.06)
    assert len(found) > 1.3 * len(examples)


def pieces_of(ids: list[int], most: int) -> list[list[int]]:
    """Returns the pieces of a text, none of one token but where that is all."""
    pieces = [ids[begin : begin + most] for begin in range(0, len(ids), most)]
    if len(pieces) > 1 and len(pieces[-1]) == 1:
        pieces[-1].insert(0, pieces[-2].pop())
    return pieces


def test_no_token_is_lost_where_a_text_ends_behind_a_piece():
    length = Corrupter(Task(), tokenizer(), 32).length
    ids = tokenizer().encode_batch([" ".join(TEXTS[:9])])[0][: 2 * length + 1]
    corpus = Corpus(MemoryDocuments(np.concatenate([ids, ids[:1], ids[:3]]), np.cumsum([ids.size, 1, 3])))
    examples = PackedRows(corpus, Corrupter(Task(), tokenizer(), 32))
    assert (examples.pieces[:, 1] - examples.pieces[:, 0]).tolist() == [length, length - 1, 2, 3]
    assert examples.pieces[0, 0] == 0 and examples.pieces[2, 1] == ids.size


def test_lengths_are_those_of_t5():
    # 568 tokens become inputs of 512 and targets of 114, and 137 become 128 and ... as in T5's random_spans_helper.
    each = Task().examples(Texts(TEXTS), using(tokenizer()), 512, train=True).corrupter
    assert (each.length, each.target_length) == (568, 114)
    assert each.denoisers[0].counts(568) == (85, 28)


def test_a_row_fills_the_input():
    examples = rows(Task(), max_length=64)
    drawn = examples.draw(examples[0], np.random.default_rng(0))
    assert drawn["attention_mask"].all() and drawn["label_weights"].all()
    noise = drawn["label_weights"].sum() - 1 - np.isin(drawn["labels"], sentinels(tokenizer())).sum()
    assert noise / examples.corrupter.length == pytest.approx(0.15, abs=0.01)


def test_batches_depend_on_the_seed_and_the_step_alone():
    examples = Task(denoisers=UL2).examples(Texts(TEXTS), using(tokenizer()), 64, train=True)
    batches = [next(TrainBatches(examples, batch_size=4, seed=seed)) for seed in (1, 1, 2)]
    assert {"input_ids", "attention_mask", "labels", "label_weights"} < set(batches[0])
    assert np.array_equal(batches[0]["labels"], batches[1]["labels"]) and not np.array_equal(
        batches[0]["labels"], batches[2]["labels"]
    )
    evaluated = [list(eval_batches(examples, batch_size=3, seed=0)) for _ in range(2)]
    assert sum(batch["valid"].sum() for batch in evaluated[0]) == len(examples)
    assert all(np.array_equal(a["labels"], b["labels"]) for a, b in zip(*evaluated, strict=True))
    stream = TrainBatches(examples, batch_size=len(examples), seed=0)
    first, second = next(stream), next(stream)  # the same rows in two epochs
    assert len({row.tobytes() for row in np.concatenate([first["labels"], second["labels"]])}) > len(examples)


def test_modes_are_named_in_the_input():
    task = Task(denoisers=("R:3:0.15", "X:3:0.5", "S:0.25"), mode_text="{mode}>")
    examples = rows(task)
    seen = set()
    for seed in range(30):
        drawn = examples.draw(examples[0], np.random.default_rng(seed))
        text = tokenizer().decode(drawn["input_ids"][drawn["attention_mask"] > 0])
        mode, opening = text[0], task.opening(tokenizer(), text[0]).size
        seen.add(mode)
        assert text[1] == ">" and put_back(drawn, opening) == examples[0]["tokens"].tolist()
    assert seen == {"R", "X", "S"}


def test_predictions_fill_the_text():
    task, tok = Task(), tokenizer()
    batch = task.inputs(["The <extra_id_0> jumps over<extra_id_1>", {"text": "<extra_id_0> cat"}], using(tok), 32, str)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    marks = sentinels(tok)
    (dog, number, the) = (tok.encode_batch([text])[0].tolist() for text in ("dog", "number 3", "The"))
    rows = [[0, marks[0], *dog, marks[1], *number, 1, *dog], [0, marks[0], *the, tok.vocab_size + 5, marks[0], *dog, marks[2]]]
    generated = np.zeros((2, 40), np.int32)
    for place, row in zip(generated, rows, strict=True):
        place[: len(row)] = row
    first, second = task.describe({"generated": generated}, batch, using(tok))
    assert first == {"text": "The dog jumps over number 3", "spans": {"<extra_id_0>": "dog", "<extra_id_1>": "number 3"}}
    assert second == {"text": "The cat", "spans": {"<extra_id_0>": "The"}}
    nothing = task.describe({"generated": np.zeros((2, 1), np.int32)}, batch, using(tok))[1]
    assert nothing == {"text": "<extra_id_0> cat", "spans": {"<extra_id_0>": ""}}
    assert task.generation == {"max_new_tokens": 64, "num_beams": 1}


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (3, "not text"),
        ({"txt": "a"}, 'object with a "text"'),
        ("no gap", "no <extra_id_0>"),
        ("<extra_id_0>" * 40, "more than the 32"),
    ],
)
def test_texts_that_cannot_be_filled_are_refused(example, message):
    with pytest.raises(UserError, match=f"item 0.*{message}"):
        Task().inputs([example], using(tokenizer()), 32, "item {}".format)


@pytest.mark.parametrize(
    "written", ["", "R", "R:3", "R:3:0.15:1", "R:0:0.15", "R:3:0", "R:3:1", "S:3:0.25", "S", "T:3:0.1", "R:a:b", "R:nan:0.1"]
)
def test_denoisers_that_are_none_are_refused(written):
    with pytest.raises(UserError, match="task.denoisers.*is not a denoiser"):
        make({"name": "span_corruption", "denoisers": [written]})


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="is empty"):
        Task(denoisers=())
    with pytest.raises(UserError, match="no room"):
        rows(Task(), max_length=2)
    with pytest.raises(UserError, match="more than the tokenizer's 100 sentinels"):
        rows(Task(denoisers=("X:1:0.5",)), max_length=256)
    with pytest.raises(UserError, match="single token"):
        Rows(np.array([5]), rows(Task()).corrupter)
    with pytest.raises(UserError, match="no text has two tokens"):
        PackedRows(Corpus(MemoryDocuments(np.array([5, 6]), np.array([1, 2]))), rows(Task()).corrupter)
    with pytest.raises(UserError, match='task.rows="join".*did you mean "joined"'):
        Task(rows="join")
    with pytest.raises(UserError, match="no sentinels"):
        Task().examples(Texts(TEXTS), using(train_tokenizer(TEXTS, "wordpiece", 100)), 32, train=True)
    with pytest.raises(UserError, match="txt"):
        Task(column="txt").resolve(Texts(TEXTS))


def test_the_tokenizer_is_saved_and_read_back(tmp_path):
    tok = tokenizer()
    assert (tok.pad_id, tok.eos_id, tok.unk_id, tok.sep_id) == (0, 1, 2, 1)
    assert tok.assemble(np.array([7, 8]))[0].tolist() == [7, 8, 1]
    assert tok.assemble(np.array([7]), np.array([8]))[0].tolist() == [7, 1, 8, 1]
    tok.save(tmp_path)
    assert load_tokenizer(tmp_path).sha256 == tok.sha256
    (tmp_path / "tokenizer_config.json").write_text("{}")  # as the reference reads it: tokenizer.json alone
    read = load_tokenizer(tmp_path)
    chinese = "你好\uff0c世界\uff01"  # with its own punctuation
    texts = [*TEXTS, "a <extra_id_3> b", f"naïve\n {chinese} €"]
    assert all(np.array_equal(a, b) for a, b in zip(read.encode_batch(texts), tok.encode_batch(texts), strict=True))
    assert np.array_equal(sentinels(read), sentinels(tok)) and read.roles == tok.roles
    assert tok.decode(tok.encode_batch([f"{chinese}\n€ naïve"])[0]) == f"{chinese} € naïve"
