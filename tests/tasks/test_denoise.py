"""Denoising: spans and sentences as BART has them, rows that give the text back, batches, predictions, refusals."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processors import using
from support.sources import MemoryRecords

from fmjax.data.stream.batches import TrainBatches, eval_batches
from fmjax.data.tokenizers.tokenizer import Tokenizer, train_tokenizer
from fmjax.errors import UserError
from fmjax.tasks import make
from fmjax.tasks.denoise import Task, infilled, permuted, sentence_ends, spans

MASK = -1
TEXTS = [f'The dog {verb} {n}. "It dreams." Is it {n}? 你好。 No' for n in range(20) for verb in ("sleeps", "walks")]


@functools.cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, "bpe", 400, lowercase=False)


class Texts(MemoryRecords):
    """Records of texts."""

    def __init__(self, texts: list[str]):
        super().__init__({"text": text} for text in texts)


def rows(task: Task, max_length: int = 48, texts: list[str] = TEXTS):
    return task.examples(Texts(texts), using(tokenizer()), max_length, train=True)


def parts(drawn: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the input's and the target's tokens of every text in a row, without the special ones around them."""
    for name, real in (("input_ids", drawn["attention_mask"]), ("labels", drawn["label_weights"])):
        assert np.all(drawn[name][real == 0] == tokenizer().pad_id) and np.all(np.diff(real) <= 0)
    found = []
    for segment in range(1, drawn["segment_ids"].max() + 1):
        whole = drawn["input_ids"][drawn["segment_ids"] == segment], drawn["labels"][drawn["decoder_segment_ids"] == segment]
        assert all((ids[0], ids[-1]) == (tokenizer().cls_id, tokenizer().end_id) for ids in whole)
        found.append((whole[0][1:-1], whole[1][1:-1]))
    return found


@settings(max_examples=200, deadline=None)
@given(total=st.integers(1, 200), mean=st.floats(1, 20), seed=st.integers(0, 999))
def test_spans_add_up(total, mean, seed):
    lengths = spans(total, mean, np.random.default_rng(seed))
    assert lengths.sum() == total and lengths.min() >= 0 and 1 <= lengths.size <= total


def test_spans_are_poisson_distributed():
    lengths = spans(100_000, 3.0, np.random.default_rng(0))
    expected = {length: np.exp(-3) * 3.0**length / np.prod(np.arange(1, length + 1)) for length in range(7)}
    assert {length: np.mean(lengths == length) for length in expected} == pytest.approx(expected, abs=0.01)
    assert lengths.mean() == pytest.approx(3, abs=0.05)


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 60), data=st.data(), seed=st.integers(0, 999))
def test_one_mask_stands_for_each_span(length, data, seed):
    lengths = np.array(data.draw(st.lists(st.integers(0, 8), max_size=12)), np.int64)
    lengths = lengths[np.cumsum(lengths) <= length]
    tokens = np.arange(length)
    damaged = infilled(tokens, lengths, MASK, np.random.default_rng(seed))
    assert (damaged == MASK).sum() == lengths.size and damaged.size == length - lengths.sum() + lengths.size
    # Putting back as many tokens for each mask as its span has gives the text.
    width = np.ones(damaged.size, np.int64)
    width[damaged == MASK] = lengths
    assert width.sum() == length
    begins = np.cumsum(width) - width
    assert np.array_equal(damaged[damaged != MASK], tokens[begins[damaged != MASK]])


def test_masks_stand_everywhere_alike():
    rng = np.random.default_rng(0)
    lengths = np.array([2, 0])
    drawn = [infilled(np.arange(6), lengths, MASK, rng).tolist() for _ in range(3000)]
    counts = [drawn.count(list(each)) for each in set(map(tuple, drawn))]
    assert len(counts) == 15 and max(counts) < 1.3 * min(counts)  # 2 of 6 places


@settings(max_examples=150, deadline=None)
@given(ends=st.lists(st.booleans(), min_size=1, max_size=40), share=st.floats(0, 1), seed=st.integers(0, 999))
def test_sentences_stay_whole(ends, share, seed):
    ends = np.array(ends)
    tokens = np.arange(ends.size)
    found = permuted(tokens, ends, share, np.random.default_rng(seed))
    assert sorted(found) == tokens.tolist()
    sentences = np.split(tokens, np.flatnonzero(ends[:-1]) + 1)
    left, order = found.tolist(), []
    while left:  # sentence by sentence
        number = next(number for number, sentence in enumerate(sentences) if sentence[0] == left[0])
        assert left[: len(sentences[number])] == sentences[number].tolist()
        left = left[len(sentences[number]) :]
        order.append(number)
    moved = sum(place != number for place, number in enumerate(order))
    assert sorted(order) == list(range(len(sentences))) and moved <= round(share * len(sentences))


def test_every_order_of_sentences_is_as_likely():
    rng, ends = np.random.default_rng(0), np.array([True, False, True, False])
    drawn = [tuple(permuted(np.arange(4), ends, 1.0, rng)) for _ in range(3000)]
    counts = [drawn.count(order) for order in set(drawn)]
    assert len(counts) == 6 and max(counts) < 1.2 * min(counts)


def test_sentences_end_with_a_full_stop():
    stops = sentence_ends(tokenizer())
    text = 'The dog sleeps. "It dreams." Is it 3? 你好。 No'
    ids = tokenizer().encode_batch([text])[0]
    sentences = np.split(ids, np.flatnonzero(stops[ids]) + 1)
    assert [tokenizer().decode(each).strip() for each in sentences if each.size][:2] == ["The dog sleeps.", '"It dreams."']
    assert not stops[ids[-1]] and 0 < stops.sum() < 40


@pytest.mark.parametrize(
    "task", [Task(), Task(permute=0.0), Task(mask_rate=0.0), Task(mask_rate=0.9, mean_span=1.0, permute=0.5)]
)
def test_targets_are_the_text_and_inputs_are_damaged_as_asked(task):
    examples, shapes = rows(task), set()
    seen: list[list[int]] = []
    for index in range(len(examples)):
        drawn = examples.draw(examples[index], np.random.default_rng(index))
        shapes.add(tuple((name, array.shape, array.dtype) for name, array in drawn.items()))
        for read, written in parts(drawn):
            seen.append(written.tolist())
            check_damage(task, read, written)
    pieces = [ids[begin : begin + 46].tolist() for ids in tokenizer().encode_batch(TEXTS) for begin in range(0, ids.size, 46)]
    assert sorted(seen) == sorted(pieces) and len(shapes) == 1
    assert examples.fill["labels"] == pytest.approx(sum(len(piece) + 2 for piece in pieces) / (48 * len(examples)))


def check_damage(task: Task, read: np.ndarray, written: np.ndarray) -> None:
    masks = read == tokenizer().mask_id
    gone = max(round(task.mask_rate * written.size), 1) if task.mask_rate else 0
    assert read.size - masks.sum() == written.size - gone and read.size <= written.size
    kept = read[~masks].tolist()
    if task.mask_rate:
        assert masks.sum() >= 1 and all(kept.count(token) <= written.tolist().count(token) for token in kept)
    else:
        assert sorted(kept) == sorted(written)
    if not task.permute:  # what is left is in order
        rest = iter(written.tolist())
        assert all(token in rest for token in kept)


def test_sentences_stay_in_their_document():
    two = ["A b. C d. E f. G h.", "I k. L m. N o. P q."]
    examples = rows(Task(mask_rate=0.0), texts=two)
    assert len(examples) == 1
    texts, orders = tokenizer().encode_batch(two), set()
    for seed in range(20):
        pairs = parts(examples.draw(examples[0], np.random.default_rng(seed)))
        for ids, (read, written) in zip(texts, pairs, strict=True):
            assert np.array_equal(ids, written) and sorted(read) == sorted(written)
        orders.add(pairs[0][0].tobytes())
    assert len(orders) > 10


def test_rows_are_full_and_a_long_document_is_cut():
    examples = rows(Task(), max_length=16, texts=["word " * 30, "", "a b", "c d"])
    sizes = [example["tokens"].size for example in map(examples.__getitem__, range(len(examples)))]
    assert max(sizes) == 14 and sizes.count(14) >= 2
    assert any(example["begins"].size for example in map(examples.__getitem__, range(len(examples))))


def test_batches_depend_on_the_seed_and_the_step_alone():
    examples = rows(Task())
    batches = [next(TrainBatches(examples, batch_size=4, seed=seed)) for seed in (1, 1, 2)]
    assert {"input_ids", "attention_mask", "labels", "label_weights"} < set(batches[0])
    same, other = (np.array_equal(batches[0]["input_ids"], batch["input_ids"]) for batch in batches[1:])
    assert same and not other
    evaluated = [list(eval_batches(examples, batch_size=3, seed=0)) for _ in range(2)]
    assert sum(batch["valid"].sum() for batch in evaluated[0]) == len(examples)
    assert all(np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(*evaluated, strict=True))


def test_predictions_are_texts():
    task, tok = Task(max_new_tokens=9, num_beams=2), tokenizer()
    batch = task.inputs(["The<mask> sleeps", {"text": "No"}], using(tok), 16, str)
    assert batch["input_ids"].shape == batch["attention_mask"].shape and (batch["input_ids"] == tok.mask_id).sum() == 1
    ids = tok.encode_batch(["The dog sleeps."])[0]
    generated = np.full((2, ids.size + 6), tok.pad_id)
    generated[0, : ids.size + 4] = [tok.end_id, tok.cls_id, *ids, tok.end_id, ids[0]]
    generated[1, 0] = tok.end_id
    assert task.describe({"generated": generated}, batch, using(tok)) == [{"text": "The dog sleeps."}, {"text": ""}]
    assert task.generation == {"max_new_tokens": 9, "num_beams": 2}


@pytest.mark.parametrize(("example", "message"), [(3, "not text"), ({"txt": "a"}, 'a "text"'), ("a " * 40, "more than the 16")])
def test_texts_that_cannot_be_read_are_refused(example, message):
    with pytest.raises(UserError, match=f"item 0: .*{message}"):
        Task().inputs([example], using(tokenizer()), 16, "item {}".format)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_rate": 1.0}, "task.mask_rate=1.0: .*less than 1"),
        ({"mask_rate": float("nan")}, "task.mask_rate=nan"),
        ({"mean_span": 0.5}, "task.mean_span=0.5: must be from 1 to 100"),
        ({"permute": 1.5}, "task.permute=1.5: must be from 0 to 1"),
        ({"mask_rate": 0.0, "permute": 0.0}, "leave the text unchanged; raise one"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        make({"name": "denoise", **values})


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="no room"):
        rows(Task(), max_length=2)
    with pytest.raises(UserError, match="has no text in any of 2 records"):
        rows(Task(), texts=["", ""])
    with pytest.raises(UserError, match="has no mask token"):
        Task().examples(Texts(TEXTS), using(train_tokenizer(TEXTS, "t5", 450)), 32, train=True)
    with pytest.raises(UserError, match="txt"):
        Task(column="txt").resolve(Texts(TEXTS))
