"""Question answering: answers found back in windows, the best span against a plain search, no answer, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processors import using
from support.sources import MemoryRecords

from fmjax import load
from fmjax.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from fmjax.errors import UserError
from fmjax.tasks import make
from fmjax.tasks.qa import NEVER, Task
from fmjax.tasks.question_windows import Windows

GOLDEN = Path(__file__).parents[1] / "golden"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{number}" for number in range(60)]


class Records(MemoryRecords):
    place, first = "question", 0


def asked(context: str, *answers: str, question: str = "who ?") -> dict[str, Any]:
    starts = [context.index(text) for text in answers]
    return {"question": question, "context": context, "answers": {"text": list(answers), "answer_start": starts}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS, "who", "?", "x", "##x", ",", "(", ")", "北", "京"]) + "\n")
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return train_tokenizer([" ".join(WORDS), "who ? 北京, ünal " * 3], "bpe", 400)


@pytest.fixture(scope="module")
def unigram() -> Tokenizer:
    return train_tokenizer([" ".join(WORDS), "who ? 北京, ünal " * 3], "unigram", 330)


def test_rows_are_questions_with_windows(tokenizer):
    source = Records([asked(" ".join(WORDS[:12]), "w9 w10", "w1")])
    examples = Task(stride=4).examples(source, using(tokenizer), 12, train=True)
    assert len(examples) == 3  # 12 tokens in windows of 7, from 0, 4, 8
    rows = [examples[index] for index in range(3)]
    tokens = [[tokenizer.token(int(i)) for i in row["input_ids"]] for row in rows]
    assert tokens[1] == ["[CLS]", "who", "?", "[SEP]", *WORDS[4:11], "[SEP]"]
    assert tokens[2] == ["[CLS]", "who", "?", "[SEP]", *WORDS[8:12], "[SEP]", "[PAD]", "[PAD]", "[PAD]"]
    assert rows[1]["context_mask"].tolist() == [0] * 4 + [1] * 7 + [0]
    assert rows[1]["token_type_ids"].tolist() == [0] * 4 + [1] * 8 and rows[2]["attention_mask"].tolist() == [1] * 9 + [0] * 3
    # The first answer; 0 where it does not stand whole.
    assert [(int(row["start_positions"]), int(row["end_positions"])) for row in rows] == [(0, 0), (9, 10), (5, 6)]
    assert rows[0]["start_positions"].dtype == np.int32


words = st.lists(st.sampled_from([*WORDS[:9], "x", "xx", "é", "北京", "(w1)", "Ünal,", "🙂", "\u200b"]), min_size=1, max_size=30)


@settings(deadline=None, max_examples=60)
@given(words, st.data(), st.integers(9, 20), st.integers(0, 3), st.sampled_from(["tokenizer", "byte_level", "unigram"]))
def test_an_answer_inside_a_window_is_found_back(request, parts, data, length, stride, kind):
    tokenizer = request.getfixturevalue(kind)
    first = data.draw(st.integers(0, len(parts) - 1))
    last = data.draw(st.integers(first, len(parts) - 1))
    context = "  ".join(parts)
    begin = sum(len(part) + 2 for part in parts[:first])
    text = "  ".join(parts[first : last + 1])
    record = {"question": "who", "context": context, "answers": {"text": [text], "answer_start": [begin]}}
    if not tokenizer.encode_batch([text])[0].size or not context.strip():
        return
    task = Task(stride=stride, max_question=4)
    examples = task.examples(Records([record]), using(tokenizer), length, train=True)
    span = examples.questions[0].span
    inside = 0
    covered = np.zeros(examples.contexts[0].ids.size, bool)
    for index, row in enumerate(examples.rows):
        example = examples[index]
        assert int(example["attention_mask"].sum()) <= length
        covered[row.begin : row.end] = True
        place = np.flatnonzero(example["context_mask"])
        assert np.array_equal(example["input_ids"][place], examples.contexts[0].ids[row.begin : row.end])
        start, end = int(example["start_positions"]), int(example["end_positions"])
        if not start:
            assert span[0] < row.begin or span[1] >= row.end
            continue
        inside += 1
        found = examples.characters(row, start, end)
        # A letter may be of several tokens, and what has no token belongs to one beside it.
        assert context[slice(*found)] == text or not context.isascii()
        assert context[slice(*found)] in text or text in context[slice(*found)]
    assert covered.all()
    room = length - tokenizer.special_count(pair=True) - examples.questions[0].ids.size
    assert inside or span[1] - span[0] > room - (stride or max(room // 2, 1))


def search(logits: np.ndarray, mask: np.ndarray, most: int) -> list[tuple[float, int, int]]:
    """Returns the score, first and last token of every span that is allowed, best first."""
    spans = [
        (float(logits[first, 0] + logits[last, 1]), first, last)
        for first in np.flatnonzero(mask)
        for last in range(first, min(first + most, len(mask)))
        if mask[last]
    ]
    return sorted(spans, reverse=True)


@pytest.mark.parametrize("most", [1, 3, 30])
def test_the_best_spans_are_those_of_a_plain_search(most):
    rng = np.random.default_rng(0)
    logits, mask = rng.normal(size=(4, 14, 2)).astype(np.float32), np.zeros((4, 14), np.int32)
    for row, (begin, end) in enumerate([(3, 13), (5, 6), (1, 14), (2, 9)]):
        mask[row, begin:end] = 1
    scores, first, last = map(np.asarray, Task(max_answer=most).best(jnp.asarray(logits), jnp.asarray(mask), 6))
    for row in range(4):
        expected = search(logits[row], mask[row], most)[:6]
        found = [found for found in zip(scores[row], first[row], last[row], strict=True) if found[0] > NEVER / 2]
        assert len(found) == len(expected)
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-5)


def pointing(examples: Windows, task: Task, spans: list[tuple[int, int] | None], sure: float = 8.0) -> dict[str, np.ndarray]:
    """Returns predictions by which each question's answer is the given span of its context's tokens; None: nothing."""
    length = examples.max_length
    logits = np.zeros((len(examples), length, 2), np.float32)
    for row, place in zip(examples.rows, logits, strict=True):
        span = spans[row.question]
        if span is not None and row.begin <= span[0] and span[1] < row.end:
            place[span[0] + examples.place(row), 0] = place[span[1] + examples.place(row), 1] = sure
        else:
            place[0] = 2
    rows = [examples[index] for index in range(len(examples))]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    arrays = task.predictions({"span": jnp.asarray(logits)}, batch)
    return {name: np.concatenate([array, array[:1]]) for name, array in arrays.items()}


def judged(task: Task, examples: Windows, spans: list[tuple[int, int] | None]) -> dict[str, float]:
    arrays = pointing(examples, task, spans)
    return task.metrics(arrays, np.array([1.0] * len(examples) + [0.0]), examples)


def test_perfect_predictions_score_100(tokenizer):
    source = Records([asked(" ".join(WORDS[:30]), "w9 w10"), asked("w1 ( xx ) w2", "xx", "( xx )"), asked("w3, w4", "w3, w4")])
    task = Task(stride=3)
    examples = task.examples(source, using(tokenizer), 13, train=False)
    assert len(examples) > 6
    values = judged(task, examples, [question.span for question in examples.questions])
    assert values.pop("loss") < 2 and values == {"exact_match": 100.0, "f1": 100.0}
    assert judged(task, examples, [(0, 0), examples.questions[1].span, (0, 0)])["exact_match"] == pytest.approx(100 / 3)
    wrong = judged(task, examples, [(9, 9), examples.questions[1].span, (0, 1)])
    assert wrong["f1"] == pytest.approx(100 * (2 / 3 + 1 + 2 / 3) / 3)


def test_marks_that_a_tokenizer_drops_belong_to_the_answer(tokenizer):
    """In lower-cased WordPiece an accent has no token; perfect predictions score 100 all the same."""
    answers = ["Cafe\u0301", "Re\u0301sume\u0301 noir", "हिन्दू", "cafe\u0301\u0323"]
    lowercased = train_tokenizer([f"who ? in {' '.join(answers)}"] * 9, "wordpiece", 200)
    source = Records([asked(f"in {text} in", text) for text in answers] + [asked(f"in {text}", text) for text in answers])
    examples = Task().examples(source, using(lowercased), 24, train=False)
    values = judged(Task(), examples, [question.span for question in examples.questions])
    assert values["exact_match"] == values["f1"] == 100.0


def test_an_answer_without_a_token_is_named(tokenizer):
    with pytest.raises(UserError, match=r"the answer '\\u200b' has no token; correct the record"):
        Task().examples(Records([asked("w1 \u200b w2", "\u200b")]), using(tokenizer), 24, train=False)


def test_a_question_may_have_no_answer(tokenizer):
    source = Records([asked("w1 w2 w3", "w2"), asked("w4 w5 w6")])
    assert Task().resolve(source) == {"unanswerable": True} and Task().resolve(Records(source[:1])) == {}
    task = Task(unanswerable=True)
    assert set(task.measures) > set(Task().measures)
    examples = task.examples(source, using(tokenizer), 12, train=False)
    row = examples[1]
    assert (int(row["start_positions"]), int(row["end_positions"])) == (0, 0)
    values = judged(task, examples, [examples.questions[0].span, None])
    assert values["exact_match"] == values["no_answer_exact_match"] == values["has_answer_f1"] == 100.0
    assert set(values) == set(task.measures)
    lenient = Task(unanswerable=True, null_threshold=10.0)
    assert judged(lenient, examples, [examples.questions[0].span, None])["no_answer_exact_match"] == 0.0
    assert judged(Task(), examples, [examples.questions[0].span, None])["no_answer_exact_match"] == 0.0


def test_the_worst_questions_are_shown(tokenizer):
    source = Records([asked("w1 w2 w3", "w2", "w3"), asked("w4 w5 w6", "w5"), asked("w7 w8")])
    task = Task(unanswerable=True)
    examples = task.examples(source, using(tokenizer), 12, train=False)
    places = np.array([[examples.place(row) + token] for row, token in zip(examples.rows, (1, 0, 0), strict=True)])
    arrays = {"scores": np.ones((4, 1)), "first": np.append(places, [[0]], 0), "last": np.append(places, [[0]], 0)}
    arrays |= {"null": np.full(4, -9.0), "losses": np.array([3.0, 1.0, 2.0, 9.0])}
    worst = task.details(arrays, np.array([1.0, 1.0, 1.0, 0.0]), examples)["worst"]
    assert [(row["example"], row["expected"], row["predicted"], row["f1"], row["loss"]) for row in worst] == [
        (3, "(no answer)", "w7", 0.0, 2.0), (2, "w5", "w4", 0.0, 1.0), (1, "w2 / w3", "w2", 100.0, 3.0)
    ]  # fmt: skip
    assert worst[0]["question"].startswith("who")


def test_no_answer_is_scored_where_it_is_least_sure(tokenizer):
    source = Records([asked(" ".join(WORDS[:12]))])
    examples = Task(stride=4).examples(source, using(tokenizer), 12, train=False)
    arrays = {"scores": np.array([[1.0], [4.0], [2.0]]), "first": np.full((3, 1), 5), "last": np.full((3, 1), 5)}
    arrays["null"] = np.array([9.0, 3.0, 7.0])
    ((text, span, best, null),) = examples.answers(arrays, np.ones(3))
    assert (text, best, null) == ("w5", 4.0, 3.0) and " ".join(WORDS[:12])[slice(*span)] == "w5"


def test_loss_is_over_the_context_and_none():
    rng = np.random.default_rng(1)
    logits, mask = rng.normal(size=(2, 6, 2)).astype(np.float32), np.array([[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0]])
    batch = {"context_mask": mask, "start_positions": np.array([2, 0]), "end_positions": np.array([4, 0])}
    allowed = mask.copy()
    allowed[:, 0] = 1
    expected = 0.0
    for row in range(2):
        for side, name in enumerate(("start_positions", "end_positions")):
            scores = np.where(allowed[row], logits[row, :, side].astype(np.float64), -np.inf)
            expected -= (scores[batch[name][row]] - np.log(np.exp(scores).sum())) / 2
    assert float(Task().loss({"span": jnp.asarray(logits)}, batch)["span"]) == pytest.approx(expected, rel=1e-5)
    assert float(Task().weights(batch)["span"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": {"text": ["w2"], "answer_start": [4]}}, 'question 1: the answer "w2" is not at character 4 of the context'),
        ({"answers": {"text": ["w2"], "answer_start": []}}, r'question 1: column "answers" holds .*, not \{"text"'),
        ({"answers": "w2"}, "question 1: column \"answers\" holds 'w2', not"),
        ({"answers": {"text": [""], "answer_start": [0]}}, 'question 1: the answer "" is not at character 0'),
        (asked("w1 \u200b w2", "\u200b"), r"question 1: the answer '\\u200b' has no token; correct the record"),
        ({"question": " "}, "question 1: column \"question\" holds ' ', not text"),
        ({"context": None, "answers": {"text": [], "answer_start": []}}, 'question 1: column "context" holds None, not text'),
    ],
)
def test_malformed_records_are_named(tokenizer, change, message):
    source = Records([asked("w1 w2", "w1"), asked("w1 w2", "w1") | change])
    with pytest.raises(UserError, match=message) as caught:
        Task().examples(source, using(tokenizer), 12, train=True)
    assert "\n" not in str(caught.value)


def test_lengths_that_do_not_fit_are_refused(tokenizer):
    source = Records([asked("w1 w2 w3", "w1", question=" ".join(WORDS[:20]))])
    assert Task(max_question=5).examples(source, using(tokenizer), 12, train=True)[0]["context_mask"].sum() == 3
    with pytest.raises(UserError, match=r"question 0: a question of 20 tokens and 3 special ones leave no room"):
        Task().examples(source, using(tokenizer), 23, train=True)
    with pytest.raises(UserError, match=r"task\.stride=5: windows of 4 tokens"):
        Task(max_question=5, stride=5).examples(source, using(tokenizer), 12, train=True)
    for name in ("max_question", "max_answer", "n_best"):
        with pytest.raises(UserError, match=f"task.{name}=0: must be at least 1"):
            make({"name": "qa", name: 0})


@pytest.mark.parametrize("example", ["who?", {"question": "who?"}, ["a"], 3, None])
def test_inputs_that_are_no_questions_are_refused(tokenizer, example):
    with pytest.raises(UserError, match="example 1: is not a question about a context; give"):
        Task().inputs([("who", "w1"), example], using(tokenizer), 12, "example {}".format)


def test_answers_are_described(tokenizer):
    context = " ".join(WORDS[:12])
    task = Task(unanswerable=True, stride=4)
    asked = [("who", context), {"question": "who ?", "context": "(xx), w1"}]
    batch = task.inputs(asked, using(tokenizer), 12, "example {}".format)
    read = batch["_windows"]
    logits = np.zeros((len(read.rows), 32, 2), np.float32)  # filled up, as predict does
    for row, place in zip(read.rows, logits, strict=True):
        if row.question == 0 and row.begin <= 4 and row.end > 6:
            place[4 + read.place(row), 0] = place[6 + read.place(row), 1] = 6
        if row.question == 1:
            place[0] = 20
    first, second = task.describe({"span": logits}, batch, using(tokenizer))
    assert {name: first[name] for name in ("answer", "start", "end")} == {"answer": "w4 w5 w6", "start": 12, "end": 20}
    assert 0.5 < first["score"] < 1  # among the twenty best; once, though two windows hold it
    assert second == {"answer": "", "score": pytest.approx(1.0), "start": 0, "end": 0}
    plain = Task(stride=4).describe({"span": logits}, batch, using(tokenizer))[1]
    assert plain["answer"] in "(xx), w1" and plain["score"] < 0.5


def test_a_folder_predicts(tmp_path):
    """Questions about a long text: more windows than are computed at once."""
    shutil.copytree(GOLDEN / "bert_span", tmp_path / "model")
    (tmp_path / "model" / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS[:36]]) + "\n")
    model = load(tmp_path / "model")
    context = " ".join(WORDS[number % 36] for number in range(700))
    found = model.predict([("w1 w2", context), ("w3", "w4 w5"), ("w1 w2", context)])
    assert found[0] == found[2]
    for answer, text in zip(found, (context, "w4 w5", context), strict=True):
        assert answer["answer"] == text[answer["start"] : answer["end"]] != "" and 0 < answer["score"] <= 1
